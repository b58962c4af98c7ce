"""Golden files: how values are normalised, packed, written and compared.

Text and structure (keys, their order, types, lengths) are compared exactly. Floats may differ in their last digits, as
they do between CPUs; ``SELFDOUBT_GOLDEN_EXACT=1`` compares them to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

FILES = Path(__file__).with_name("files")
EXACT = "SELFDOUBT_GOLDEN_EXACT"
RELATIVE, ABSOLUTE = 1e-3, 1e-4
#: A percentile is a step function of a risk: next to zero, a last digit moves it by many steps.
STEPS = {"percentile": 0.15}
#: Longer lists of numbers are kept as a few of them, their sums and a hash of them all.
LONG = 12
#: Values that differ from run to run or from version to version.
VARYING = frozenset({"seconds", "created", "versions", "system_fingerprint", "transformers_version", "peft_version"})
_NUMBER = re.compile(r"(?<![\w.#])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")
_IDS = re.compile(r"\b(chatcmpl|cmpl|score|req)-[0-9a-f-]{8,}")
_HASH = re.compile(r"[0-9a-f]{16,64}")

Value = Any


def text(value: str) -> dict[str, Value]:
    """Return text as lines and, apart from them, the numbers with a decimal point in them."""
    numbers: list[str] = []

    def take(found: re.Match[str]) -> str:
        if not set(".e") & set(found[0]):
            return found[0]
        numbers.append(found[0])
        return "{}"

    lines = [_NUMBER.sub(take, _placeless(line.rstrip())) for line in value.splitlines()]
    return {"~lines": lines, "~numbers": numbers}


def lines(value: str) -> list[Value]:
    """Return the objects of JSON lines."""
    return [normalise(json.loads(line)) for line in value.split("\n") if line]


def normalise(value: Value) -> Value:
    """Return JSON without what varies, with long lists of numbers packed."""
    if isinstance(value, dict):
        return {key: "~" if key in VARYING else normalise(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > LONG and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            return pack(list(value))
        return [normalise(item) for item in value]
    if isinstance(value, str):
        return _placeless(value)
    return value


def _placeless(value: str) -> str:
    """Return text without what names this run or the folder that it is in."""
    return _IDS.sub(r"\1-ID", value.replace(str(Path.cwd()), "$WORK"))


def pack(numbers: list[float]) -> dict[str, Value]:
    """Return a short description of many numbers."""
    return {
        "~numbers": len(numbers),
        "first": numbers[:3],
        "last": numbers[-1],
        "sum": math.fsum(numbers),
        "size": math.fsum(map(abs, numbers)),
        "hash": _hash(numbers, 8),
    }


def _hash(value: Value, length: int) -> str:
    """Return a hash of JSON, of all digits of its numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]


def _rounded(value: Value) -> Value:
    """Return JSON with ten digits of its floats, more than a float32 has."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def tensors(path: Path) -> dict[str, Value]:
    """Return names, shapes, types and values of a safetensors file, and its metadata."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    entries: dict[str, Value] = {}
    for name, tensor in sorted(found.items()):
        values = tensor.double().flatten().tolist()
        entries[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "values": normalise(values)}
    return {"metadata": metadata, "tensors": entries}


class _Page(HTMLParser):
    """Visible text of a page, and how many elements of each kind and class it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.words: list[str] = []
        self.hidden = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = ".".join(sorted((dict(attrs).get("class") or "").split()))
        name = f"{tag}.{classes}" if classes else tag
        self.elements[name] = self.elements.get(name, 0) + 1
        if tag in ("style", "script"):
            self.hidden = tag

    def handle_endtag(self, tag: str) -> None:
        self.hidden = "" if tag == self.hidden else self.hidden

    def handle_data(self, data: str) -> None:
        if data.strip() and not self.hidden:
            self.words.append(" ".join(data.split()))


def page(html: str) -> dict[str, Value]:
    """Return the visible words of a page and the number of its elements."""
    reader = _Page()
    reader.feed(html)
    reader.close()
    return {"elements": dict(sorted(reader.elements.items())), "words": text("\n".join(reader.words))}


def file_hash(path: Path) -> str:
    """Return a hash of a file's bytes, which is compared only where floats are compared to the bit."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def names(folder: Path) -> list[str]:
    """Return the files under a folder."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"\b[0-9a-f]{16}\b", "HASH", name) for name in found)


def numbers_in(value: Value) -> list[float]:
    """Return all numbers of JSON in their order."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def shape_of(value: Value) -> Value:
    """Return the keys and types of normalised JSON, without its numbers."""
    if isinstance(value, dict):
        if "~numbers" in value and "hash" in value:
            return "numbers"
        shapes = {key: shape_of(item) for key, item in value.items()}
        groups: dict[str, list[str]] = {}
        for key, item in shapes.items():
            groups.setdefault(json.dumps(item), []).append(key)
        if len(groups) * 3 <= len(shapes):
            return [{"~keys": " ".join(keys), "~each": json.loads(item)} for item, keys in groups.items()]
        if all(isinstance(s, str) for s in shapes.values()):
            return ", ".join(f"{key}: {s}" for key, s in shapes.items())
        return shapes
    if isinstance(value, list):
        items = [shape_of(item) for item in value]
        return [items[0], "..."] if len(items) > 1 and all(s == items[0] for s in items) else items
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def write(name: str, value: Value) -> Path:
    """Write a golden file."""
    FILES.mkdir(exist_ok=True)
    path = FILES / f"{name}.json"
    path.write_text(_dump({"hash": _hash(value, 16), "value": _rounded(value)}) + "\n", encoding="utf-8")
    return path


def _dump(value: Value, depth: int = 0) -> str:
    """Return JSON with what is short on one line."""
    short = json.dumps(value, ensure_ascii=False)
    if len(short) + depth <= 400 or not isinstance(value, dict | list):
        return short
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        inner = [f"{pad}{json.dumps(k, ensure_ascii=False)}: {_dump(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(pad + _dump(v, depth + 1) for v in value) + "\n" + " " * depth + "]"


def check(name: str, value: Value, *, always_near: bool = False) -> None:
    """Compare a value with its golden file.

    Args:
        name: Of the golden file.
        value: What was found.
        always_near: Compare floats nearly, where they depend on what a server happened to compute together.

    Raises:
        AssertionError: Where they differ, with the first places.
    """
    wanted = read(name)
    exact = os.environ.get(EXACT) == "1" and not always_near
    places = list(differences(wanted["value"], _rounded(value), is_same if exact else is_near, name))
    assert not places, f"{len(places)} places differ from the golden file:\n" + "\n".join(places[:12])
    assert not exact or wanted["hash"] == _hash(value, 16), f"{name} differs from the golden file in its last digits"


def read(name: str) -> Value:
    """Return a golden file: its value, floats to ten digits, and a hash of all digits."""
    return json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))


def differences(
    wanted: Value, found: Value, same: Callable[[float, float, float], bool], at: str, room: float = 0.0
) -> Iterator[str]:
    """Yield the places where two values differ."""
    if isinstance(wanted, bool) or isinstance(found, bool) or type(wanted) is not type(found):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (wanted, found))
        if numbers and same is is_near and same(wanted, found, room):
            return
        if type(wanted) is not type(found) or wanted != found:
            yield f"{at}: golden {wanted!r:.200}, found {found!r:.200}"
    elif isinstance(wanted, dict):
        if list(wanted) != list(found):
            yield (
                f"{at}: golden keys {[k for k in wanted if k not in found]} are missing, "
                f"{[k for k in found if k not in wanted]} are new, or their order differs"
            )
        scale = RELATIVE * wanted["size"] if "~numbers" in wanted and "hash" in wanted else 0.0
        for key in wanted.keys() & found.keys():
            if key == "hash" and same is is_near:
                continue
            if key == "~numbers" and isinstance(wanted[key], list):
                yield from _differing_texts(wanted[key], found[key], same, f"{at}.{key}")
            else:
                more = STEPS.get(key, scale if key == "sum" else 0.0)
                yield from differences(wanted[key], found[key], same, f"{at}.{key}", more)
    elif isinstance(wanted, list):
        if len(wanted) != len(found):
            yield f"{at}: golden length {len(wanted)}, found {len(found)}"
        for i, (a, b) in enumerate(zip(wanted, found, strict=False)):
            yield from differences(a, b, same, f"{at}[{i}]")
    elif isinstance(wanted, float):
        if not same(wanted, found, room):
            yield f"{at}: golden {wanted!r}, found {found!r}"
    elif isinstance(wanted, str) and same is is_near and _HASH.fullmatch(wanted) and _HASH.fullmatch(found):
        if len(wanted) != len(found):
            yield f"{at}: golden {wanted}, found {found}"
    elif wanted != found:
        yield f"{at}: golden {wanted!r:.300}, found {found!r:.300}"


def _differing_texts(
    wanted: list[str], found: list[str], same: Callable[[float, float, float], bool], at: str
) -> Iterator[str]:
    """Yield printed numbers that differ by more than one unit of the last printed place."""
    if len(wanted) != len(found):
        yield f"{at}: golden has {len(wanted)} numbers, found {len(found)}"
    for i, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a == b:
            continue
        digits = len(a.partition("e")[0].partition(".")[2])
        exponent = int(a.partition("e")[2] or 0)
        unit = 1.01 * 10.0 ** (exponent - digits)
        if same is is_same or not (same(float(a), float(b), 0.0) or abs(float(a) - float(b)) <= unit):
            yield f"{at}[{i}]: golden {a}, found {b}"


def is_near(wanted: float, found: float, room: float) -> bool:
    return math.isclose(wanted, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE + room)


def is_same(wanted: float, found: float, room: float) -> bool:
    return wanted == found
