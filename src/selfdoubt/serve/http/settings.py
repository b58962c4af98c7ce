"""How a server behaves towards those who ask; how much it takes on is in ``limits``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfdoubt.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Args:
        name: The model's name, by which requests ask for it.
        keys: Who may ask; empty lets anybody, which is for this machine only.
        temperature: Of requests that name none; 1 is what OpenAI defines.
        max_tokens: Of chats that name none, so that each does not reserve room for the longest answer allowed.
        risk: Whether answers come with risks, where a request does not say no.
        withhold: Whether answers that the calibration abstains from are replaced, where a request does not say.
        origins: Web pages (``https://host:port``) that may ask from a browser; "*" for all.
        hosts: Names under which the server may be addressed while there are no keys, besides those of this machine.
        body_bytes: Longest body of a request.
        depth: Deepest nesting of a request's JSON.
        connections: Most connections that are open at once.
        header_seconds: Seconds in which the head of a request must be complete.
        idle_seconds: Seconds that a connection stays open after an answer without a further request.
        log_requests: One line a request, without what was asked.
        log_prompts: What was asked, too.

    Raises:
        ConfigError: If a setting is out of range.
    """

    name: str = "pocket"
    keys: tuple[str, ...] = field(default=(), repr=False)
    temperature: float = 1.0
    max_tokens: int = 1024
    risk: bool = True
    withhold: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes: int = 1 << 20
    depth: int = 32
    connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: float = 75.0
    log_requests: bool = False
    log_prompts: bool = False

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
                raise ConfigError(f"key {number} is no key: it must be ASCII without spaces")  # never shown
        for origin in self.origins:
            if origin != "*" and ("://" not in origin or origin.count("/") > 2):
                raise ConfigError(f"an origin looks like https://example.org, or is *; got {origin!r}")


def read_keys(given: Sequence[str]) -> tuple[str, ...]:
    """API keys, each given as itself or as a file with one a line; empty lines and ``#`` lines are none.

    Raises:
        ConfigError: If a file has no key, or cannot be read.
    """
    keys: list[str] = []
    for item in given:
        if not os.path.isfile(item):
            if os.sep in item:
                raise ConfigError(f"there is no file of keys {item!r}")
            keys.append(item)
            continue
        try:
            lines = [line.strip() for line in Path(item).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {item!r} cannot be read: {type(error).__name__}") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"there is no key in {item!r}; write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))
