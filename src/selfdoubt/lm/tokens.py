"""Builds ``Token``s from scored token ids: each gets its piece of the text, its risk and its alternatives."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from selfdoubt.lm.answer import Alternative, Token
from selfdoubt.lm.scores import TOKEN_RISK, Signal
from selfdoubt.lm.text.detokenizer import TEXTS, TextsBetween, detokenize_in_chunks
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.lm.token_table import ScoredId


class TokenBuilder:
    """A builder of ``Token``s from ids with their scores.

    Args:
        tokenizer: A Hugging Face tokenizer.
        risk: Name of the signal that is a token's risk.
    """

    def __init__(self, tokenizer: Any, risk: Signal = TOKEN_RISK) -> None:
        self._tokenizer = tokenizer
        self._risk = risk
        self._texts = TextsBetween(tokenizer)

    def build(self, scored: ScoredId, text: str) -> Token:
        """Return the token of one id; ``text`` is the piece that it adds to the text."""
        fields = scored._asdict()
        # Where the chosen token lost its space, its alternatives would lose theirs, too.
        lost = bool(scored.alternatives) and self._texts[scored.id] == f" {text}"
        others = tuple(
            Alternative(self._texts[i].removeprefix(" " if lost else ""), i, math.exp(logprob))
            for i, logprob in fields.pop("alternatives")
        )
        value = 0.0 - scored.logprob if self._risk == "nll" else getattr(scored, self._risk)
        return Token(text=text, **fields, risk=value, alternatives=others)

    def build_in_chunks(
        self, scored: Sequence[ScoredId | None], ids: Sequence[int], before: Sequence[int] = ()
    ) -> Generator[None, None, list[Token]]:
        """Build the tokens of a text, some hundreds at a time.

        Args:
            scored: Scores of each id; None for an id that nothing predicted.
            ids: Token ids of the text.
            before: Ids that the text continues, see ``Detokenizer``.

        Yields:
            Nothing, after each piece.

        Returns:
            The tokens, without those that nothing predicted.
        """
        texts = yield from detokenize_in_chunks(self._tokenizer, ids, before)
        tokens: list[Token] = []
        for token, text in zip(scored, texts, strict=True):
            if token is not None:
                tokens.append(self.build(token, text))
                if not len(tokens) % TEXTS:
                    yield
        return tokens

    def build_question_in_chunks(
        self, scored: Sequence[ScoredId | None], prompt: Prompt
    ) -> Generator[None, None, list[Token]]:
        """Build the user's tokens of a question from the scores of its prompt; as ``build_in_chunks``."""
        places = [i for i, is_user_token in enumerate(prompt.is_user_token) if is_user_token]
        return self.build_in_chunks([scored[i] for i in places], [prompt.ids[i] for i in places])
