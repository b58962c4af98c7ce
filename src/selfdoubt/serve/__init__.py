"""The server: an engine that answers many requests at once, and the ways to reach it.

``engine`` knows no HTTP; ``openai`` is its API as data, ``http`` the web application, ``chat`` the page, and ``ray``
runs several engines.
"""

from __future__ import annotations

__all__ = ["chat", "engine", "http", "openai", "ray"]
