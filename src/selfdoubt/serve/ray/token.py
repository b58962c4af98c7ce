"""Ray clusters that ask for a token; this is for before Ray is imported, because it looks only then."""

from __future__ import annotations

import os
from pathlib import Path


def offer_token() -> None:
    """Show this machine's token to the cluster, if there is one.

    ``ray start`` asks for a token as soon as its machine has one, but programs that join show theirs only where
    ``RAY_AUTH_MODE`` is "token". A cluster that asks for none does not mind.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
