"""Defaults of decoding. Importing this imports nothing heavy, so that the command line can show them."""

from __future__ import annotations

MAX_TOKENS = 256
TEMPERATURE = 0.0  #: greedy decoding: the most probable token each time
TOP_P = 1.0
SEED = 0
ALTERNATIVES = 5  #: most probable tokens that come with each token
BATCH_SIZE = 32  #: prompts that run side by side
MAX_ATTEMPTS = 10  #: most answers of ``generate_until``
