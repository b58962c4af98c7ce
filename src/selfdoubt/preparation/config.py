"""Settings of a preparation as one frozen dataclass; its fields are flags of ``selfdoubt prepare``."""

from __future__ import annotations

from dataclasses import dataclass

from selfdoubt.errors import ConfigError
from selfdoubt.lm import defaults
from selfdoubt.setting import setting


@dataclass(frozen=True)
class PreparationConfig:
    """Settings of how the reference answers are made.

    Raises:
        ConfigError: If a setting is out of range.
    """

    #: As many as ``ask`` and ``chat`` take: sums over tokens compare only answers with equal room.
    max_tokens: int = setting(defaults.MAX_TOKENS, "Most tokens of an answer; as many as you will ask with.")
    batch_size: int = setting(defaults.BATCH_SIZE, "Questions per batch.")
    seed: int = setting(defaults.SEED, "Seed of the subset that --limit takes.")

    #: Fit statistics of the features on the answers, so that tokens have the signal ``density``.
    density: bool = True

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
