"""Serving: a batching engine, OpenAI's API over it, replicas on Ray and a page to chat."""
