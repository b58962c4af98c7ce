"""Checks of the code's language: docstrings, banned words, names with two homes, private imports, circles.

Run it on a folder to see what is left: ``python -m tests.meta.language src/selfdoubt/serve``.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "src" / "selfdoubt"

#: Words that say less than the field's own. Matched as whole words in docstrings, comments, messages and names.
BANNED_WORDS = (
    "whoever", "nobody", "anew", "so many", "told", "mend", "mends", "mended", "is no", "what is wanted",
    "beside a token", "cannot be had", "sureness", "withheld", "withhold", "withholds",
)  # fmt: skip
BANNED_NAMES = ("found", "own", "wanted", "told", "said", "plan", "line", "job", "paper", "once", "parts", "tries")
NOUN_CLAUSE = re.compile(r"(What|Whether|Who|Whom|Whose|How|Where|Which|When|Why)\b")
NAMED_TUPLES = frozenset({"_replace", "_asdict", "_fields", "_make"})
#: Names that every room may have: a command per file, a check of its own arguments, ...
SHARED_NAMES = frozenset({"T", "P", "log", "Wrapper", "Normal", "main", "__all__"})


def python_files(root: Path = ROOT) -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(root.rglob("*.py"))}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, text) of each docstring: "module", "class" or "function"."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                kind = {"Module": "module", "ClassDef": "class"}.get(type(node).__name__, "function")
                yield getattr(node, "lineno", 1), kind, text


def noun_clauses(tree: ast.Module) -> list[tuple[int, str]]:
    """Return docstrings that begin with a clause in place of a verb or a noun."""
    return [(line, text.split("\n")[0]) for line, _, text in docstrings(tree) if NOUN_CLAUSE.match(text)]


#: First words of docstrings of functions that are no verbs.
ARTICLES = re.compile(r"(The|A|An|One|All|Each|Every|Its|Their|Those|These|Some|Several|Places|Rows|Lines|Names|Ids)\b")


def verbless(tree: ast.Module) -> list[tuple[int, str]]:
    """Return docstrings of functions (not of properties) that begin with a noun."""
    properties = {
        id(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("property" in ast.unparse(d) or "fixture" in ast.unparse(d) for d in node.decorator_list)
    }
    hits = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and id(node) not in properties:
            text = ast.get_docstring(node)
            if text and ARTICLES.match(text):
                hits.append((node.lineno, text.split("\n")[0]))
    return hits


def banned(source: str) -> list[tuple[int, str]]:
    """Return lines of prose (comments, docstrings, messages) with a banned word."""
    # "There is no answer" is plain English, "this is no answer" is not.
    pattern = re.compile(r"(?<!there )\b(" + "|".join(map(re.escape, BANNED_WORDS)) + r")\b", re.IGNORECASE)
    return [(number, m.group(1)) for number, line in enumerate(source.splitlines(), 1) for m in pattern.finditer(line)]


def variables(tree: ast.Module) -> list[tuple[int, str]]:
    """Return assignments to, and parameters of, names that say nothing."""
    hits = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in BANNED_NAMES:
            hits.append((node.lineno, node.id))
        elif isinstance(node, ast.arg) and node.arg in BANNED_NAMES:
            hits.append((node.lineno, node.arg))
    return hits


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def homonyms(files: dict[str, Path]) -> dict[str, list[str]]:
    """Return public top-level names that several files define, with the files."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, path in files.items():
        for top in set(top_level_names(ast.parse(path.read_text(encoding="utf-8")))):
            if not top.startswith("_") and top not in SHARED_NAMES:
                homes[top].append(name)
    return {name: where for name, where in sorted(homes.items()) if len(where) > 1}


def private_uses(tree: ast.Module) -> list[tuple[int, str]]:
    """Return imports of another module's private name, and attributes that belong to another module's objects.

    A private attribute belongs to the file that assigns or defines it; those of named tuples and of other packages'
    modules are theirs to name.
    """
    hits, defined = [], set(NAMED_TUPLES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfdoubt"):
            private = (a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__"))
            hits += [(node.lineno, name) for name in private]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if node.attr not in defined and owner not in ("self", "cls", "super()") and not owner.startswith("torch"):
                hits.append((node.lineno, ast.unparse(node)))
    return hits


def undefined_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Return names that are read and bound nowhere in the file.

    Linters cannot look for them here: the axis names of jaxtyping's shapes look to them like names. Those stand in
    strings, which this leaves alone.
    """
    bound = set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__path__"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name
        ):
            bound.add(node.name)
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return [(node.lineno, node.id) for node in names if node.id not in bound]


def imports_of(name: str, files: dict[str, Path]) -> set[str]:
    """Return modules of the package that a file imports, lazily and for typing included."""
    known, targets = set(files), set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {a.name.removeprefix("selfdoubt.") for a in node.names if a.name.startswith("selfdoubt.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "selfdoubt":
            module = (node.module or "").removeprefix("selfdoubt").lstrip(".")
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                hit = next((n for n in (full, f"{full}.__init__", module, f"{module}.__init__") if n in known), None)
                targets.add(hit or "__init__")
    return targets - {name}


def circles(files: dict[str, Path]) -> list[list[str]]:
    """Return groups of files that import each other in a circle (strongly connected components, Tarjan, 1972)."""
    graph = {name: sorted(imports_of(name, files) & set(files)) for name in files}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group: list[str] = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    sys.setrecursionlimit(5000)
    for name in graph:
        if name not in index:
            visit(name)
    return groups


def main() -> None:
    """Print what is left in the given folders, with counts."""
    roots = [Path(a).resolve() for a in sys.argv[1:]] or [ROOT]
    counts: dict[str, int] = defaultdict(int)
    for path in (p for root in roots for p in ([root] if root.is_file() else sorted(root.rglob("*.py")))):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for check, hits in {
            "noun clause": noun_clauses(tree), "no verb": verbless(tree), "banned word": banned(source),
            "variable": variables(tree), "private": private_uses(tree),
        }.items():  # fmt: skip
            counts[check] += len(hits)
            for line, text in hits:
                print(f"{path}:{line}: {check}: {text}")
    everything = python_files()
    for name, where in homonyms(everything).items():
        if any(everything[w].is_relative_to(root) or everything[w] == root for w in where for root in roots):
            counts["homonym"] += 1
            print(f"homonym {name}: {', '.join(where)}")
    for group in circles(everything):
        counts["circle"] += 1
        print(f"circle: {', '.join(group)}")
    print(dict(counts))


if __name__ == "__main__":
    main()
