"""The server: an engine that batches many requests, an HTTP server, a chat page, and replicas.

``engine`` knows no HTTP; ``openai`` defines requests and replies, ``http`` is the web application, ``chat`` the page,
and ``ray`` runs several engines.
"""

from __future__ import annotations

__all__ = ["chat", "engine", "http", "openai", "ray"]
