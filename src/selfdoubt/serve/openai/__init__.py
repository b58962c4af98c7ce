"""OpenAI's API as data: requests, responses, errors and the schema, with risk next to every token."""
