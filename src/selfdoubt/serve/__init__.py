"""Many people ask one model at a time: an engine that batches them, an OpenAI-compatible server, and a page to chat."""
