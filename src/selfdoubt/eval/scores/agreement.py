"""Doubt from several sampled answers to the same question: how far they agree, in meaning or in words. Pure functions.

Every score grows with doubt. Two answers are the same by a rule (``Same``): equal in normal form, alike in words,
each entailing the other by an NLI model (``selfdoubt.eval.scores.entailment``), or close by a sentence encoder
(``selfdoubt.eval.scores.embedding``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, runtime_checkable

from selfdoubt.errors import ConfigError, NonFiniteError, ShapeError
from selfdoubt.eval.judges.text import check_f1_threshold, make_same_key, parse_f1_threshold, rouge_l, token_f1

#: Scores of the answer itself that ``cocoa`` weighs by the samples' dissimilarity to it.
COCOA_DOUBTS = ("sum_nll", "mean_nll", "mean_total")
#: Names of the scores here; they need further answers to the same question.
AGREEMENT_SCORES = (
    "self_consistency", "semantic_entropy", "semantic_entropy_weighted", "n_clusters", "lexical_dissimilarity",
    *(f"cocoa_{name}" for name in COCOA_DOUBTS),
)  # fmt: skip


#: A rule that says which pairs of answers to a question mean the same: one truth value per pair. The order within a
#: pair does not matter.
Same = Callable[[Sequence[tuple[str, str]], str], list[bool]]


@runtime_checkable
class GradedSame(Protocol):
    """A rule that also knows how similar two answers are."""

    def __call__(self, pairs: Sequence[tuple[str, str]], question: str, /) -> list[bool]:
        """Compare each pair."""

    def similarity(self, pairs: Sequence[tuple[str, str]], question: str, /) -> list[float]:
        """Return the similarity of each pair, in [0, 1]."""


@dataclass(frozen=True)
class SameText:
    """Equal in SQuAD's normal form, and in the signs that change a meaning: -5 is not 5, C++ is not C."""

    def __call__(self, pairs: Sequence[tuple[str, str]], _question: str = "", /) -> list[bool]:
        """Compare each pair."""
        return [make_same_key(a) == make_same_key(b) for a, b in pairs]


@dataclass(frozen=True)
class SameWords:
    """Token F1 of at least ``threshold``."""

    threshold: float = 0.5  #: in (0, 1]

    def __post_init__(self) -> None:
        check_f1_threshold(self.threshold)

    def __call__(self, pairs: Sequence[tuple[str, str]], _question: str = "", /) -> list[bool]:
        """Compare each pair."""
        return [token_f1(a, b) >= self.threshold for a, b in pairs]

    def similarity(self, pairs: Sequence[tuple[str, str]], _question: str = "", /) -> list[float]:
        """Return the token F1 of each pair; equal texts are alike, even without words."""
        return [1.0 if a == b else token_f1(a, b) for a, b in pairs]


_SAME_TEXT = SameText()


def build_equivalence(spec: str) -> Same:
    """Build a rule by name: exact, f1, f1:0.5, nli:FOLDER_OR_HUB_NAME, or embed:FOLDER_OR_HUB_NAME, embed:FOLDER:0.7.

    Raises:
        ConfigError: If the name is unknown, or its setting is wrong.
    """
    name, colon, setting = spec.partition(":")
    if name == "exact" and not colon:
        return _SAME_TEXT
    if name == "f1":
        return SameWords(parse_f1_threshold(setting)) if colon else SameWords()
    if name == "nli" and setting:
        from selfdoubt.eval.scores.entailment import SameMeaning

        return SameMeaning(setting)
    if name == "embed" and setting:
        from selfdoubt.eval.scores.embedding import parse_encoder

        return parse_encoder(setting)
    raise ConfigError(
        f"no rule is called {spec!r}; choose one of exact, f1:0.5, nli:FOLDER_OR_HUB_NAME, embed:FOLDER_OR_HUB_NAME"
    )


def cluster_answers(texts: Sequence[str], alike: Same = _SAME_TEXT, question: str = "") -> list[int]:
    """Return the cluster of each text, numbered in the order in which they appear.

    A text joins the first cluster whose first text means the same, else it starts one (Kuhn et al., 2023, algorithm 1).

    Example:
        >>> cluster_answers(["Paris", "Rome", "paris."])
        [0, 1, 0]
    """
    apart = list(dict.fromkeys(texts))
    pairs = list(combinations(apart, 2))
    known = dict(zip(pairs, alike(pairs, question), strict=True)) if pairs else {}
    leaders: list[str] = []
    cluster: dict[str, int] = {}
    for text in apart:
        cluster[text] = next((i for i, leader in enumerate(leaders) if known[leader, text]), len(leaders))
        if cluster[text] == len(leaders):
            leaders.append(text)
    return [cluster[text] for text in texts]


def self_consistency(greedy: str, samples: Sequence[str], alike: Same = _SAME_TEXT, question: str = "") -> float:
    """Return the share of samples that do not mean the same as the answer, in [0, 1] (after Wang et al., 2023).

    Raises:
        ConfigError: If there are no samples.
    """
    _at_least(1, samples)
    apart = [text for text in dict.fromkeys(samples) if text != greedy]
    known = dict(zip(apart, alike([(greedy, text) for text in apart], question), strict=True)) if apart else {}
    return sum(not known.get(text, True) for text in samples) / len(samples)


def semantic_entropy(clusters: Sequence[int]) -> float:
    """Return the entropy of the clusters' shares of samples, in nats, in [0, log n] (Farquhar et al., 2024, discrete).

    Args:
        clusters: Number of each sample's cluster, as from ``cluster_answers``.

    Raises:
        ConfigError: If there are no samples.
    """
    _at_least(1, clusters)
    shares = [clusters.count(c) / len(clusters) for c in set(clusters)]
    return max(0.0, -math.fsum(p * math.log(p) for p in sorted(shares)))


def semantic_entropy_weighted(clusters: Sequence[int], nll: Sequence[float]) -> float:
    """Return the entropy of the clusters weighted by likelihood, in nats, in [0, log clusters] (Kuhn et al., 2023).

    p(c) is the sum of exp(-nll) over its samples, normalised over the clusters (the Rao-Blackwellised form of Farquhar
    et al., 2024). A text drawn twice counts twice, as in theirs.

    Args:
        clusters: Number of each sample's cluster, as from ``cluster_answers``.
        nll: Negative log-likelihood of each sample, nats: ``sum_nll``, or ``mean_nll`` to normalise by length.

    Raises:
        ConfigError: If there are no samples.
        ShapeError: If there is not one number per sample.
        NonFiniteError: If one is NaN or infinite.
    """
    _at_least(1, clusters)
    if len(clusters) != len(nll):
        raise ShapeError(f"wanted one nll for each of {len(clusters)} samples, got {len(nll)}")
    if not all(map(math.isfinite, nll)):
        raise NonFiniteError(f"a sample's nll is NaN or infinite: {[*nll]}")
    least = min(nll)
    mass = [
        math.fsum(math.exp(least - v) for c, v in zip(clusters, nll, strict=True) if c == one)
        for one in sorted(set(clusters))
    ]
    whole = math.fsum(mass)
    return max(0.0, -math.fsum(m / whole * math.log(m / whole) for m in mass if m > 0))


def lexical_dissimilarity(samples: Sequence[str], measure: str = "rouge") -> float:
    """Return one minus the mean similarity over pairs of samples, in [0, 1] (Fomicheva et al., 2020; Kuhn et al.,
    2023).

    Args:
        samples: Two or more answers.
        measure: "rouge" for ROUGE-L, "f1" for token F1. Equal texts are alike, even without words.

    Raises:
        ConfigError: If there are fewer than two samples, or no such measure.
    """
    _at_least(2, samples)
    measures = {"rouge": rouge_l, "f1": token_f1}
    if measure not in measures:
        raise ConfigError(f"no similarity is called {measure!r}; choose one of {', '.join(measures)}")
    pairs = list(combinations(sorted(samples), 2))
    return max(0.0, 1 - math.fsum(1.0 if a == b else measures[measure](a, b) for a, b in pairs) / len(pairs))


def dissimilarity(greedy: str, samples: Sequence[str], alike: Same = _SAME_TEXT, question: str = "") -> float:
    """Return one minus the mean similarity of samples to the answer, in [0, 1].

    A rule without degrees (``GradedSame``) gives 1 or 0 for each: then this is ``self_consistency``.

    Raises:
        ConfigError: If there are no samples.
    """
    if not isinstance(alike, GradedSame):
        return self_consistency(greedy, samples, alike, question)
    _at_least(1, samples)
    apart = [text for text in dict.fromkeys(samples) if text != greedy]
    known = dict(zip(apart, alike.similarity([(greedy, text) for text in apart], question), strict=True))
    return math.fsum(1 - known.get(text, 1.0) for text in samples) / len(samples)


def cocoa(doubt: float, dissimilarity: float) -> float:
    """Return CoCoA: the doubt of an answer times the samples' dissimilarity to it (Vashurin et al., 2025, equation 8).

    Args:
        doubt: A score of the answer itself, at least 0: see ``COCOA_DOUBTS``.
        dissimilarity: The mean over samples of one minus their similarity to the answer, in [0, 1].

    Example:
        >>> cocoa(2.0, 0.25)
        0.5
    """
    return doubt * dissimilarity


def agreement_scores(
    greedy: str,
    samples: Sequence[str],
    nll: Sequence[float] | None = None,
    alike: Same = _SAME_TEXT,
    question: str = "",
    doubts: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return all scores by the names in ``AGREEMENT_SCORES``; without ``nll``, ``doubts`` or a second sample, fewer.

    Args:
        greedy: The answer whose doubt is measured.
        samples: Answers drawn at temperature 1, or as you like.
        nll: ``sum_nll`` of each sample, nats.
        alike: Rule for answers of the same meaning.
        question: The question; only an NLI model reads it.
        doubts: Scores of the answer itself, by name; those in ``COCOA_DOUBTS`` count.

    Raises:
        ConfigError: If there are no samples.
        ShapeError: If there is not one ``nll`` per sample.
        NonFiniteError: If an ``nll`` is NaN or infinite.
    """
    clusters = cluster_answers(samples, alike, question)
    scores = {
        "self_consistency": self_consistency(greedy, samples, alike, question),
        "semantic_entropy": semantic_entropy(clusters),
        "n_clusters": float(len(set(clusters))),
    }
    if nll is not None:
        scores["semantic_entropy_weighted"] = semantic_entropy_weighted(clusters, nll)
    if len(samples) > 1:
        scores["lexical_dissimilarity"] = lexical_dissimilarity(samples)
    if doubts:
        apart = dissimilarity(greedy, samples, alike, question)
        scores |= {f"cocoa_{name}": cocoa(doubts[name], apart) for name in COCOA_DOUBTS if name in doubts}
    return scores


def _at_least(n: int, samples: Sequence[object]) -> None:
    if len(samples) < n:
        raise ConfigError(f"agreement needs at least {n} sample{'s' * (n > 1)}, got {len(samples)}; draw more answers")
