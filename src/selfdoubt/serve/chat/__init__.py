"""The page to chat on: every token in the colour of its doubt. Gradio is imported when a page is made, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfdoubt.errors import require
from selfdoubt.lm import defaults

if TYPE_CHECKING:
    from fastapi import FastAPI

    from selfdoubt.serve.engine.client import Desk

__all__ = ["mount"]


def mount(
    app: FastAPI,
    engine: Desk,
    *,
    title: str | None = None,
    model: str | None = None,
    max_tokens: int = defaults.MAX_TOKENS,
    auth: Any = None,
) -> FastAPI:
    """Put the page under ``/`` of an app; mount it last, it answers every path that nothing else answers.

    Args:
        app: Where it goes.
        engine: Who answers; started by the caller.
        title: The browser tab's.
        model: The model's name, as it is shown; None takes the name that its config has.
        max_tokens: Most tokens of an answer, unless a person moves the slider.
        auth: Name and password, or a function that checks them; Gradio's own.

    Returns:
        The same app.

    Raises:
        MissingExtraError: If Gradio is not installed.
    """
    require("gradio", "serve")
    from selfdoubt.serve.chat.page import mount_page

    mount_page(app, engine, title=title, model=model, max_tokens=max_tokens, auth=auth)
    return app
