"""``ServerSettings``: keys, defaults and limits of the HTTP server; limits on requests are in ``engine.limits``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfdoubt.errors import ConfigError
from selfdoubt.setting import setting


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Args:
        name: The model's name, by which requests ask for it.
        keys: Keys of the clients; empty accepts any client, which is for this machine only.
        temperature: Temperature of requests that name none; OpenAI defines 1.
        max_tokens: Most tokens of chats that name none, so that they do not reserve room for the longest answer.
        risk: Send risks, unless a request turns them off.
        hide_abstained: Replace answers that the calibration abstains from, unless a request says otherwise.
        origins: Web pages (``https://host:port``) that may send requests from a browser; "*" for all.
        hosts: Further host names, next to this machine's, that are accepted while there are no keys.
        body_bytes: Longest body of a request.
        depth: Deepest nesting of a request's JSON.
        connections: Most connections that are open at once.
        header_seconds: Seconds in which the head of a request must be complete.
        idle_seconds: Seconds that a connection stays open after an answer without a further request.
        log_requests: Log one line per request, without its prompt.
        log_prompts: Log prompts, too.

    Raises:
        ConfigError: If a setting is out of range.
    """

    name: str = "pocket"
    keys: tuple[str, ...] = field(default=(), repr=False)
    temperature: float = setting(1.0, "Temperature of requests that name none; 0 takes the most probable token.")
    max_tokens: int = setting(1024, "Most tokens of an answer to a chat that names no number.")
    risk: bool = True
    hide_abstained: bool = setting(
        False, "Say 'I'm not sure.' in place of answers that the model is not sure of.", flag="--withhold"
    )
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = setting(1 << 20, "Longest body of a request.")
    depth: int = 32
    connections: int = setting(512, "Most connections; beyond, the one that has waited longest without a request goes.")
    header_seconds: float = setting(10.0, "Seconds in which the head of a request must be complete.")
    idle_seconds: float = setting(75.0, "Seconds that a connection stays open without a further request.")
    log_requests: bool = setting(False, "One line per request, without its text.")
    log_prompts: bool = setting(False, "Log prompts, too.")

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise ConfigError(f"the model's name must be printable text, got {self.name!r}; give one with --name")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"the temperature must be between 0 and 2, got {self.temperature}")
        for name in ("max_tokens", "body_bytes", "depth", "connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("header_seconds", "idle_seconds"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}")
        for number, key in enumerate(self.keys, 1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"key {number} is not a key: it must be ASCII without spaces")  # never shown
        for origin in self.origins:
            if origin != "*" and ("://" not in origin or origin.count("/") > 2):
                raise ConfigError(f"an origin looks like https://example.org, or is *; got {origin!r}")


def read_keys(given: Sequence[str]) -> tuple[str, ...]:
    """Return API keys, each given as itself or as a file with one per line; empty lines and ``#`` lines are skipped.

    Raises:
        ConfigError: If a file has no key, or cannot be read.
    """
    keys: list[str] = []
    for item in given:
        if not os.path.isfile(item):
            if os.sep in item:
                raise ConfigError(f"no file of keys {item!r} exists; check its path")
            keys.append(item)
            continue
        try:
            rows = [row.strip() for row in Path(item).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {item!r} cannot be read: {type(error).__name__}") from None
        read = [row for row in rows if row and not row.startswith("#")]
        if not read:
            raise ConfigError(f"the file {item!r} has no key; write one per line")
        keys += read
    return tuple(dict.fromkeys(keys))
