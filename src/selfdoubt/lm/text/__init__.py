"""Conversion of text to token ids and back: chat templates, prompts, encoders, detokenizers, stop texts.

Import from its files: each needs a tokenizer, and most callers need one of them only.
"""

from __future__ import annotations

__all__ = ["detokenizer", "encoder", "placeholders", "prompt", "prompt_form", "stops", "template"]
