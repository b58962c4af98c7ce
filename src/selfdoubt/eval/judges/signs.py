"""Signs that change what a short text means: -5 is not 5, C++ not C, 10⁶ not 106. Pure functions.

``keep_signs`` marks such signs by where they stand, so that ``judges.text.fold`` drops only the others; ``find_spans``
finds a folded name in a folded text; ``say_signs`` says a sign in words.
"""

# ruff: noqa: RUF001 (fullwidth signs are marks here)
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

#: Scripts that put no space between words: Thai, Lao, Khmer, Burmese, kana, bopomofo, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff\U00020000-\U0003ffff"
)
#: Korean puts spaces, and particles behind a name without one.
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
_MONEY = "".join(c for c in map(chr, range(0x20, 0xA900)) if unicodedata.category(c) == "Sc")  # of currencies
#: Units behind or before a number. A name without one is found with any; two different ones are not the same.
UNITS = f"{_MONEY}%‰‱°"
_MULTIPLES = "十百千万億兆萬亿만억조천백"  # 5万 is 50,000
_ANY, _LETTER, _WORD = r"[^\W_]", r"[^\W\d_]", rf"[^\W{UNSPACED}{HANGUL}]"
_NUMBER = r"\d+(?:[\d．：／]*\d)?(?:＾－?\d+)?"
#: Signs that precede the number or name they belong to. Fullwidth forms are marks: no folded text holds them otherwise.
_PREFIXES = "－＜＞≤≥≠±∓√∛∜¬≮≯≰≱"
#: Mathematical signs that say nothing of the value: about, arrows, dots, bars.
_SILENT = frozenset("+=|~^<>≈∼≃≅∽⋅∙∗∣∘⁄")
_MARKS: dict[int, str] = {ord(full): chr(ord(full) - 0xFEE0) for full in "＋－＃＆＊．／：＾＿＜＞"} | {ord("﹣"): "-"}

_SUPERSCRIPT = re.compile("(?<=(.))(?=[⁰¹²³⁴-⁹⁺⁻ⁿ])([⁰¹²³⁴-⁹]*)([⁺⁻]?)([⁰¹²³⁴-⁹]*)(ⁿ(?!ᵈ))?", re.DOTALL)
_SUBSCRIPT = re.compile(r"(?<=\d)(?=[₀-₉])(?<![₀-₉])")
_VULGAR = re.compile("(?<=[0-9])\\s?(?=[¼½¾⅐-⅞])")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_FIRST_DOT = re.compile(r"(?<![^\s\"(\[{“«])\.(?=(\w)(\w?))")
_LATEX = re.compile(r"\$(\S(?:[^$\n]*\S)?)\$(?!\d)")
_BRACED = re.compile(r"\^\{([^{}]*)\}")


def keep_forms(text: str) -> str:
    """Spell out the forms that a compatibility decomposition would run together: 10⁶ as 10^6, 2½ as 2 ½.

    A superscript behind a letter is its digits (m², m^2 and m2 are one); of a charge the sign stays (Ca²⁺: Ca2+).
    """
    text = _BRACED.sub(r"^\1", _LATEX.sub(r"\1", text))
    text = _SUPERSCRIPT.sub(_raised, text)
    text = _VULGAR.sub(" ", _SUBSCRIPT.sub("_", _SPACED_THOUSANDS.sub("", text)))
    # ".NET" and ".txt" are names; "Paris .Rome" and ".Paris" lack a space.
    return _FIRST_DOT.sub(lambda m: " " if m[1].isupper() and m[2].islower() else ".", text)


def _raised(match: re.Match[str]) -> str:
    before, digits, sign, more, power = match.groups()
    plain = unicodedata.normalize("NFKC", f"{digits}{sign}{more}{power or ''}").replace("\u2212", "-")
    behind_letter = not (before.isdecimal() and before not in "₀₁₂₃₄₅₆₇₈₉")
    lone = bool(sign) and not more
    return plain if not plain or (behind_letter and (digits or lone)) else f"^{plain}"


#: Signs that a text must have for the rule to apply, the pattern, and the replacement.
_RULES: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (signs, re.compile(pattern), to)
    for signs, pattern, to in (
        ("<", r"</?[a-z][^<>]*>", " "),  # a tag
        ("*", r"(?<=\d)\*\*(?=-?\d)", "^"),
        (">-", r"[-=]+>|<[-=]{2,}", " "),  # an arrow
        ("+", r"\+/?-|\+ ?/ ?-", "±"),
        (">⩾≧", r">=|[⩾≧]", "≥"),
        ("<⩽≦", r"=<|<=|[⩽≦]", "≤"),
        ("!", r"!=", "≠"),
        ("∕⁄", "[∕⁄]", "/"),
        ("∶", "∶", ":"),
        ("♯", "♯", "#"),
        # One canonical order of sign, currency and point.
        ("-", rf"(?<!{_WORD})([{_MONEY}])\s?-(?=[.\d])", r"-\1"),
        (".", rf"(?<![^\s{UNSPACED}{HANGUL}\-<>≤≥≠±√({{\[\"=:{_MONEY}])\.(?=\d)", "0."),
        ("^", r"(?<=[^\W\d_])\^(?=\d)", ""),
        ("^", rf"(?<={_ANY})\^-(?={_ANY})", "＾－"),
        ("^", rf"(?<={_ANY})\^(?={_ANY})", "＾"),
        ("-", r"(?<=\de)-(?=\d)", "－"),
        # A minus stands free or behind an opening sign, before a number or a letter of algebra.
        (
            "-",
            rf"(?<!{_WORD})(?<![)\]}}.+#*%°\-!?])-(?=[{_MONEY}]?\d|[∞√π]|[b-hj-zα-ω](?!\w))",
            "－",
        ),
        (".", r"(?<=\d)\.(?=\d)", "．"),
        (".", rf"(?<![^\s\"(\[{{“«])\.(?={_LETTER})", "．"),
        (":", r"(?<=\d):(?=\d)", "："),
        # A fraction; 2019/20 and 2019/2020 are years.
        ("/", r"(?<![\w/])(?!(?:1\d|20)\d\d/\d\d(?:\d\d)?(?!\d))(\d+)/(\d+)(?![\w/])", r"\1／\2"),
        ("_", r"(?<=\d)_(?=\d)", "＿"),
        # A plus behind a word, within C++11, and between numbers and letters of algebra.
        ("+", rf"(?<={_ANY})\+\+(?!{_WORD}|\+)|(?<={_ANY})\+\+(?={_ANY})", "＋＋"),
        ("+", rf"(?<={_ANY})\+(?!{_WORD}|\+)|(?<=\d)\+(?=\d)|(?<=\b{_ANY})\+(?={_ANY}\b)", "＋"),
        # A minus behind a blood group, a mark or an ion.
        (
            "-",
            r"(?:(?<=\b[a-hj-z])|(?<=\b(?:ab|cl|br|oh|cn|rh|hs))|(?<=\b[a-z]\d)|(?<=\b[a-z][a-z]\d)|(?<=\b[a-z]{3}\d)"
            r"|(?<=\b[a-z][a-z]\d\d))-(?![^\s.,;:!?)\]}\"])",
            "﹣",
        ),
        ("#", r"(?<=\b[a-z])#", "＃"),
        ("*", r"(?<=\b[a-z])(?<!\*[a-z])\*(?![\w*])", "＊"),
        ("&", rf"(?<!\w)({_ANY}{{1,2}}) ?& ?({_ANY}{{1,2}})(?!\w)", r"\1＆\2"),
        ("<", rf"(?<![<>])<(?=\s*－?[{_MONEY}]?\d)", "＜"),
        (">", rf"(?<![<>])>(?=\s*－?[{_MONEY}]?\d)", "＞"),
    )
)
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")
_NEGATED = re.compile("([^\\w\\s])\u0338")
_MONEY_FIRST = re.compile(rf"(?<![\d{_MONEY}])(－?)([{_MONEY}]+)\s?({_NUMBER})")
_UNIT_BEHIND = re.compile(rf"(?<=\d)\s+(?=[{UNITS}])")
_UNIT_BEFORE = re.compile(rf"(?<=[{UNITS}])(?=[^\s{UNITS}])")
_PREFIX = re.compile(rf"(?<=[{_PREFIXES}])\s+")


def compose_negated(text: str) -> str:
    """Keep the stroke of ≠, ≮ and the like when marks are removed."""
    return _NEGATED.sub(lambda m: unicodedata.normalize("NFC", m[0]), text)


def keep_signs(plain: str) -> str:
    """Return a text in lower case with a space for each sign that says nothing, and the others in one form."""
    for _ in range(4):  # dropping a sign may bring two others together
        kept = _keep_once(plain)
        if kept == plain:
            break
        plain = kept
    return plain


def _keep_once(plain: str) -> str:
    plain = plain.translate(_DASHES)
    for signs, pattern, to in _RULES:
        if any(c in plain for c in signs):
            plain = pattern.sub(to, plain)
    plain = "".join(map(_kept, plain))
    plain = _MONEY_FIRST.sub(r" \1\3\2", " ".join(plain.split()))
    plain = _UNIT_BEFORE.sub(" ", _UNIT_BEHIND.sub("", plain))
    return " ".join(_PREFIX.sub("", plain).translate(_MARKS).split())


@lru_cache(4096)
def _kept(c: str) -> str:
    kind = unicodedata.category(c)
    if kind[0] not in "PSC" or ord(c) in _MARKS or c in _PREFIXES or kind == "Sc" or c in "%‰‱°♭♮":
        return c
    silent = c in _SILENT or "\u2190" <= c <= "\u21ff" or "\u27f0" <= c <= "\u297f"
    return f" {c} " if kind == "Sm" and not silent else " "


#: Particles and endings of Korean that stand behind a name.
_PARTICLES = (
    "이?었?습니다|입니다|입니까|이?었?다|이?에요|예요|이?야|이?죠|이?지요?|인데요?|이?라[고는]?|이?란|이?며|이?고|이?나|이?든지?|이?여서?|"
    "은|는|이|가|을|를|의|에서?|에게서?|에는|으?로서?|으?로써|와|과|도|만|까지|부터|마저|조차|밖에|께서?|한테서?|하고|보다|처럼|같이|요|년|월|일|명|개|원|시|분"
)


@lru_cache(4096)
def _finder(words: str) -> re.Pattern[str]:
    tokens = words.split()
    named = [p for p in tokens if p.strip(UNITS)] or tokens
    body = rf"(?: [{UNITS}]+)? ".join(_pattern(word) for word in named)
    first, last = named[0][0], named[-1].rstrip(UNITS)[-1:] or named[-1][-1]
    edge = rf"[^\s{UNSPACED}{HANGUL}]"
    before, after = rf"(?<!{edge})", rf"(?!{edge})"
    if first.isdecimal():
        before += rf"(?<![{_MULTIPLES}])"
    if last.isdecimal():
        after += rf"(?![{_MULTIPLES}]| \d+/\d)"
    if re.match(f"[{UNSPACED}]", first):
        before = ""
    elif re.match(f"[{HANGUL}]", first):
        before = f"(?<![{HANGUL}])"
    if re.match(f"[{UNSPACED}]", last):
        after = ""
    elif re.match(f"[{HANGUL}]", last):
        after = f"(?=(?:{_PARTICLES}){{0,3}}(?![{HANGUL}]))"
    return re.compile(f"{before}({body}){after}")


def _pattern(word: str) -> str:
    core = word.rstrip(UNITS)
    units = word[len(core) :]
    if not core or not core[-1].isdecimal():
        return re.escape(word)
    return rf"{re.escape(core)}[{re.escape(units) or UNITS}]*"


def find_spans(words: str, text: str) -> list[tuple[int, int]]:
    """Return the spans ``(first, end)`` of ``words`` as whole words in ``text``, both folded.

    A unit at a number may be missing in either, and must not differ. In scripts without spaces between words they may
    stand anywhere, in Korean before particles, and a change between such a script and another ends a word.
    """
    # Most names stand nowhere, and to compile a pattern takes long.
    if not words or not all(part.rstrip(UNITS) in text for part in words.split()):
        return []
    return [m.span(1) for m in _finder(words).finditer(text)]


_SPOKEN: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern), spoken)
    for pattern, spoken in (
        (r"(?<!\S)-(?=\S)", ("minus ", "negative ")),
        (r"(?<!\S)≥", ("at least ", "greater than or equal to ", "no less than ", "not less than ")),
        (r"(?<!\S)≤", ("at most ", "less than or equal to ", "no more than ", "not more than ", "up to ")),
        (r"(?<!\S)>", ("more than ", "greater than ", "over ", "above ")),
        (r"(?<!\S)<", ("less than ", "fewer than ", "smaller than ", "under ", "below ")),
        (r"(?<!\S)±", ("plus or minus ", "plus minus ")),
        (r"(?<!\S)√", ("square root of ", "the square root of ", "root ")),
        (r"(?<=[^\W\d_])\+\+(?!\S)", (" plus plus",)),
        (r"(?<=[\w])\+(?!\S)", (" plus", " positive", " or more", " and over")),
        (r"(?<=[^\W_])-(?!\S)", (" minus", " negative")),
        (r"(?<=[^\W\d_])#", (" sharp",)),
        (r"(?<=[^\W\d_])♭", (" flat",)),
        (r"(?<!\S)\.(?=[^\W\d_])", ("dot ",)),
        (r"(?<=\d)\^(?=\S)", (" to the power of ", " to the power ", " to the ")),
    )
)


def say_signs(words: str) -> Iterator[str]:
    """Yield the folded name with a sign in words, in each usual wording; nothing for a name without signs.

    Example:
        >>> list(say_signs("-5")), list(say_signs("c#"))
        (['minus 5', 'negative 5'], ['c sharp'])
    """
    for pattern, spoken in _SPOKEN:
        if pattern.search(words):
            yield from (pattern.sub(way, words) for way in spoken)


def extract_signs(folded: str) -> str:
    """Return the signs of a folded text that change its meaning, without units.

    Example:
        >>> extract_signs("c++ is 3.5$")
        '++.'
    """
    return "".join(c for c in folded if not c.isalnum() and not c.isspace() and c not in UNITS)
