"""The chat page: every token in the colour of its risk.

``mount`` puts it into a web app. Gradio is imported when a page is made, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfdoubt.errors import require
from selfdoubt.lm import defaults

if TYPE_CHECKING:
    from fastapi import FastAPI

    from selfdoubt.serve.engine.client import EngineClient

__all__ = ["mount"]


def mount(
    app: FastAPI,
    engine: EngineClient,
    *,
    title: str | None = None,
    model: str | None = None,
    max_tokens: int = defaults.MAX_TOKENS,
    auth: Any = None,
) -> FastAPI:
    """Put the page under ``/`` of an app; mount it last, it answers every path that no other route answers.

    Args:
        app: The app.
        engine: The engine that answers; started by the caller.
        title: Title of the browser tab; None takes a default.
        model: Name of the model to show; None takes the name in its config.
        max_tokens: Most tokens of an answer, until a user moves the slider.
        auth: Name and password, or a function that checks them, as Gradio's ``auth``.

    Returns:
        The same app.

    Raises:
        MissingExtraError: If Gradio is not installed.
    """
    require("gradio", "serve")
    from selfdoubt.serve.chat.page import mount_page

    mount_page(app, engine, title=title, model=model, max_tokens=max_tokens, auth=auth)
    return app
