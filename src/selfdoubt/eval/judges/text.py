"""Comparison of two short texts: normal forms, word overlap, and answers that decline. Pure functions."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from selfdoubt.errors import ConfigError
from selfdoubt.eval.judges.signs import compose_negated, extract_signs, find_spans, keep_forms, keep_signs

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))

#: Letters that no decomposition of Unicode takes apart.
_LETTERS = str.maketrans(
    {
        "ł": "l",
        "ø": "o",
        "đ": "d",
        "ð": "d",
        "þ": "th",
        "æ": "ae",
        "œ": "oe",
        "ħ": "h",
        "\u0131": "i",
        "ŧ": "t",
        "ŋ": "n",
    }
)
#: Marks above and below Latin, Greek and Cyrillic letters. Those of other scripts are vowels or change the sound.
_MARKS = re.compile("[\u0300-\u036f]")
_APOSTROPHES = dict.fromkeys(map(ord, "'`\u2019\u2018\u02bc\u00b4"), " ")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ABBREVIATION = re.compile(r"(?<=\b[^\W\d_])\.")
_LATIN_WORD = re.compile(r"[a-z0-9]+")


def normalise(text: str) -> str:
    """Return a text in SQuAD's normal form: lower case, no ASCII punctuation, no English articles, single spaces.

    (Rajpurkar et al., 2016.)

    A text of nothing else ("A", "the", "...") stays as it is, in lower case: it is not the same as an empty answer.

    Example:
        >>> normalise("The  Eiffel-Tower!"), normalise("A")
        ('eiffeltower', 'a')
    """
    bare = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split()) or " ".join(text.lower().split())


def token_f1(one: str, other: str) -> float:
    """Return the harmonic mean of precision and recall of words in normal form, in [0, 1] (SQuAD)."""
    a, b = normalise(one).split(), normalise(other).split()
    if not a or not b:
        return float(a == b)
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))


def rouge_l(one: str, other: str) -> float:
    """Return the F-measure of the longest common subsequence of words, in [0, 1] (ROUGE-L of a sentence; Lin, 2004).

    Words are runs of ASCII letters and digits in lower case, as in the usual implementation: of other scripts it sees
    nothing.

    Example:
        >>> round(rouge_l("The cat sat.", "the cat sat down"), 3)
        0.857
    """
    a, b = (_LATIN_WORD.findall(text.lower()) for text in (one, other))
    return 2 * _longest_common(a, b) / (len(a) + len(b)) if a and b else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for i, other in enumerate(b):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
        above = row
    return above[-1]


@lru_cache(4096)
def fold(text: str) -> str:
    """Return a text as lower-case words without accents and punctuation, to find a name in a sentence.

    Accents: what NFKD takes apart from Latin, Greek and Cyrillic letters, and a small table of ł, ø, đ and others (ß
    becomes ss). Dashes, apostrophes and other signs separate words; dots of abbreviations (U.S.) and commas of
    thousands (1,000) do not. Signs that change the meaning stay where they stand for it (``judges.signs``): -5, 3.5,
    5:30, C++, C#, ≥ 5, Na+, 10^6.

    Example:
        >>> fold("The city of Łódź (U.S.A.-born), 1,000.5")
        'the city of lodz usa born 1000.5'
        >>> fold("−5 °C, C++, >= 5, 10⁶")
        '-5° c c++ ≥5 10^6'
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", keep_forms(text)).casefold())
    plain = plain.translate(_APOSTROPHES)
    plain = unicodedata.normalize("NFC", _MARKS.sub("", compose_negated(plain))).translate(_LETTERS)
    return keep_signs(_ABBREVIATION.sub("", _THOUSANDS.sub("", plain)))


def make_same_key(text: str) -> tuple[str, str]:
    """Return a key that is equal for texts of the same meaning: SQuAD's normal form, and signs that change a meaning.

    Example:
        >>> make_same_key("The C++!") == make_same_key("c++"), make_same_key("C++") == make_same_key("C")
        (True, False)
        >>> make_same_key("3.5") == make_same_key("35")
        False
    """
    return normalise(text), extract_signs(fold(text))


def check_f1_threshold(threshold: float) -> None:
    """Check that a threshold of token F1 is in (0, 1].

    Raises:
        ConfigError: If it is outside.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"the F1 threshold must be in (0, 1], got {threshold}; 0.5 is usual")


def parse_f1_threshold(text: str) -> float:
    """Parse the setting of ``f1:0.5``.

    Raises:
        ConfigError: If it is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the F1 threshold must be a number in (0, 1], got {text!r}; write e.g. f1:0.5") from None


def find_places(words: str, text: str) -> list[int]:
    """Return the positions of ``words`` as whole words in ``text``, both folded.

    As ``selfdoubt.eval.judges.signs.find_spans``, which also gives their ends.
    """
    return [start for start, _ in find_spans(words, text)]


def is_inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether a span of characters is part of a longer one."""
    return span != other and other[0] <= span[0] and span[1] <= other[1]


#: Whole answers that decline, folded (an apostrophe is a space).
DECLINING = frozenset({"none", "n a", "unknown", "unsure", "impossible", "idk", "pass"})
_UNKNOWN_TO_ALL = re.compile("no(body| one) knows")
#: Beginnings of answers that decline, folded and without "the": regular expressions.
DECLINING_STARTS = (
    "i (don t|do not|dont) know",
    "(i (m|am) )?(not sure|unsure|not certain|uncertain)",
    "i (m|am) (not able|unable) to",
    "(i have )?no (idea|comment|answer|information)",
    "i (cannot|can t|can not|could not|couldn t) (answer|determine|say|tell|find|know)",
    "i (don t|do not) have (enough|sufficient|any|the) information",
    "there (is|s) (no|not enough|insufficient) (answer|information)",
    "there (isn t|is not) (an answer|enough information)",
    "(not enough|insufficient) information",
    "it (is|s) (not possible|impossible) to (say|tell|know|determine|answer)",
    "((it|this|question|this question|answer) )?(cannot|can t|can not) be (determined|answered|known|found)",
    "((it|this|question|this question|answer) (is|s) )?(unanswerable|not answerable|undetermined)",
    "((it|answer) (is|s) )?(not|never) (given|stated|mentioned|specified|provided|known|said|in (the )?(passage|text))",
    "(it|answer) (is|s) unknown",
    "(passage|text|context|article|paragraph) (does not|doesn t|has no|gives no)",
)
_STARTS = re.compile(rf"(sorry )?(the )?({'|'.join(DECLINING_STARTS)})\b")
_TURNS = re.compile(r"\b(but|however|although|though|maybe|perhaps|probably)\b")


def declines(text: str | None) -> bool:
    """Return whether an answer says that it has none: empty, one of ``DECLINING``, or one of ``DECLINING_STARTS``.

    An answer that goes on to give one ("I'm not sure, but I think it is Paris") does not decline.

    Example:
        >>> declines("I don't know."), declines("Unanswerable"), declines("I'm not sure, but maybe Paris.")
        (True, True, False)
    """
    plain = fold(text or "")
    return (
        not plain
        or plain in DECLINING
        or bool(_UNKNOWN_TO_ALL.fullmatch(plain))
        or (bool(_STARTS.match(plain)) and not _TURNS.search(plain))
    )
