"""Ray's token authentication: set up before Ray is imported, because Ray reads its environment then."""

from __future__ import annotations

import os
from pathlib import Path


def offer_token() -> None:
    """Let Ray present this machine's token to the cluster, if the machine has one.

    ``ray start`` asks for a token as soon as its machine has one, but programs that join show theirs only where
    ``RAY_AUTH_MODE`` is "token". A cluster that asks for none does not mind.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
