"""The shape of the code: which file may import which, what is public, how long files are, and that examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import selfdoubt

ROOT = Path(__file__).parents[2] / "src" / "selfdoubt"
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
LONGEST, LONGEST_OF_A_CLASS = 350, 450

CORE = {
    "version",
    "trained_state",
    "time_axes",
    "isolation",
    "errors",
    "fields",
    "formatting",
    "lazy",
    "messages",
    "scales",
    "setting",
    "targets",
    "tree",
    "risk",
    "distributions",
    "forecast",
    "rows",
    "gaussian",
    "kernels",
    "factors",
    "deviations",
    "random_numbers",
    "sharing",
    "spec",
    "fused_layers",
    "merging",
    "model_inputs",
    "model_outputs",
    "members",
    "wrapping",
    "compat",
}
WRAPPERS = {"vote", "sample", "sculpt", "density"}
#: What a file may import of the package; others are free.
ARROWS = {
    "version": set(),
    "errors": set(),
    "fields": {"errors"},
    "formatting": set(),
    "lazy": set(),
    "compat": {"errors"},
    "messages": set(),
    "scales": {"errors", "tree"},
    "setting": set(),
    "tree": set(),
    "time_axes": {"errors", "tree"},
    "trained_state": set(),
    "distributions": set(),
    "risk": {"distributions", "errors"},
    "targets": {"errors", "compat", "rows"},
    "forecast": {"distributions", "errors", "risk", "tree"},
    "gaussian": {"errors"},
    "rows": {"errors"},
    "kernels": {"errors", "compat", "rows", "targets", "tree"},
    "factors": {"compat", "kernels", "rows"},
    "deviations": {"compat", "kernels", "targets"},
    "random_numbers": set(),
    "sharing": {"compat", "errors", "rows"},
    "spec": {"errors", "rows", "targets"},
    "fused_layers": {"rows"},
    "isolation": {"errors", "rows", "sharing", "tree"},
    "merging": {"compat", "errors", "kernels"},
    "model_inputs": {"errors", "rows", "tree"},
    "model_outputs": {"errors", "tree"},
    "members": CORE - {"kernels", "factors", "deviations", "random_numbers", "formatting", "gaussian", "wrapping"},
    "wrapping": {"errors", "members", "rows", "spec", "targets"},
    **dict.fromkeys(sorted(WRAPPERS), CORE),
    "noise": CORE,
    "noise_fit": CORE | {"noise", "vote"},
    "wrapper_text": {"errors"},
    "manifest": {"errors", "fields", "spec", "wrapper_text"},
    "fingerprint": {"random_numbers", "rows"},
    "storage": CORE | {"manifest", "fingerprint"},
}
#: Third-party packages that the core may import at its top.
CORE_LIBRARIES = {"torch", "jaxtyping", "safetensors"}


def imports(path: Path, *, everywhere: bool = True):
    """(module, line) of each import; with ``everywhere=False`` only of those that run when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            is_skipped = "TYPE_CHECKING" in ast.dump(node.test)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_skipped = not everywhere
        else:
            continue
        if is_skipped:
            skipped |= {id(n) for child in node.body for n in ast.walk(child)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "selfdoubt":
                yield from ((f"selfdoubt.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def own(path, **options):
    """Modules of this package that a file imports, without the package's name."""
    names = (m.removeprefix("selfdoubt.") for m, _ in imports(path, **options) if m.startswith("selfdoubt."))
    return {"__init__" if name.startswith("__") else name for name in names}


@pytest.mark.parametrize("name", ARROWS)
def test_the_core_imports_only_what_lies_below_it(name):
    assert own(FILES[name]) - {name} <= ARROWS[name]


def test_every_file_of_the_core_has_its_arrows():
    assert set(ARROWS) == {n for n in FILES if "." not in n} - {"__init__", "__main__", "workflow"}


#: Which rooms a room may import, lazily and for typing included. Never upwards, and no circle.
ROOMS = {
    "metrics": {"core"},
    "interpret": {"core", "metrics"},
    "data": {"core"},
    "lm": {"core", "pocket"},  # "pocket" is a name that load knows
    "train": {"core", "data", "lm"},
    "eval": {"core", "data", "lm"},
    "calibration": {"core", "eval", "lm", "metrics"},
    "report": {"core", "eval", "lm", "metrics"},
    "preparation": {"core", "data", "eval", "lm"},
    "serve": {"core", "lm"},
    "pocket": set(),
    "workflow": {"calibration", "core", "data", "eval", "lm", "report"},
    "cli": {
        "calibration",
        "core",
        "data",
        "eval",
        "lm",
        "pocket",
        "preparation",
        "report",
        "serve",
        "train",
        "workflow",
    },
}


def room(name: str) -> str:
    top = name.partition(".")[0]
    return top if top in ROOMS else "core"


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("__init__", "__main__") and room(n) != "core"])
def test_a_room_imports_only_rooms_below_it(name):
    used = {room(n) for n in own(FILES[name])} - {room(name)}
    assert used <= ROOMS[room(name)]
    assert "pocket" not in own(FILES[name], everywhere=False) or room(name) == "cli"


def test_every_room_has_its_arrows():
    assert set(ROOMS) - {"workflow"} == {n.partition(".")[0] for n in FILES if "." in n}


@pytest.mark.parametrize("name", ARROWS)
def test_the_core_needs_only_torch(name):
    import sys

    top = {m.partition(".")[0] for m, _ in imports(FILES[name])}
    assert top - set(sys.stdlib_module_names) - {"selfdoubt"} <= CORE_LIBRARIES


def test_the_token_loop_knows_no_text_and_no_model_library():
    for name in ("lm.decode", "lm.prefill", "lm.sampling", "lm.stepper"):
        assert not {m.partition(".")[0] for m, _ in imports(FILES[name])} & {"transformers", "tokenizers"}
        assert not own(FILES[name]) & {"lm.text.prompt", "lm.model", "lm.load"}


def test_optional_packages_are_imported_where_they_are_used():
    optional = {"transformers", "bitsandbytes", "peft", "tokenizers", "typer", "rich", "sklearn", "scipy", "lightning"}
    optional |= {"fastapi", "starlette", "uvicorn", "pydantic", "gradio", "prometheus_client", "ray"}
    # Files that are imported where they are used may import at their top.
    only_for_them = {"cli.terminal": {"rich"}, **dict.fromkeys(sorted(WEB), optional)}
    for name, path in FILES.items():
        if name.startswith("train.") and name not in LIGHT:
            continue
        if name in WEB:  # one of them may import another
            assert not own(path, everywhere=False) & {"cli.terminal"}
            continue
        found = {m.partition(".")[0] for m, _ in imports(path, everywhere=False)} & optional
        assert found <= only_for_them.get(name, set()), f"{name} imports {found} when it is imported"
        assert not own(path, everywhere=False) & set(only_for_them), f"{name} imports too early"


#: What is imported when a server starts.
WEB = {
    "serve.openai.requests",
    "serve.openai.responses",
    "serve.openai.params",
    "serve.openai.format",
    "serve.openai.schema",
    "serve.openai.score",
    "serve.http.streaming",
    "serve.http.app",
    "serve.http.metrics",
    "serve.http.process",
    "serve.http.connections",
    "serve.chat.page",
}
LIGHT = {"train.__init__", "train.config"}  # what the command line reads before it runs anything


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("data.")])
def test_readers_of_data_import_themselves_and_no_library(name):
    assert {n for n in own(FILES[name]) if n.partition(".")[0] != "data"} <= {"errors", "lazy", "setting"}
    top = {m.partition(".")[0] for m, _ in imports(FILES[name], everywhere=False)}
    assert top <= set(__import__("sys").stdlib_module_names) | {"selfdoubt"}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("metrics.")])
def test_metrics_are_pure(name):
    top = {m.partition(".")[0] for m, _ in imports(FILES[name])}
    assert top - set(__import__("sys").stdlib_module_names) <= {"selfdoubt", "numpy", "scipy", "jaxtyping"}
    assert {n for n in own(FILES[name]) if not n.startswith("metrics")} <= {"errors"}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("interpret.")])
def test_decisions_need_only_torch(name):
    top = {m.partition(".")[0] for m, _ in imports(FILES[name])}
    assert top - set(__import__("sys").stdlib_module_names) <= {"selfdoubt", "torch", "jaxtyping"}
    assert not {n for n in own(FILES[name], everywhere=False) if n.partition(".")[0] == "metrics"}  # needs numpy


def test_training_reads_its_settings_without_a_library():
    for name in LIGHT:
        top = {m.partition(".")[0] for m, _ in imports(FILES[name], everywhere=False)}
        assert top <= set(__import__("sys").stdlib_module_names) | {"selfdoubt"}


def words(path):
    """Strings and names in a file's code, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = (n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n))
    texts = {id(first.value) for first in firsts if isinstance(first, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr


@pytest.mark.parametrize("name", FILES)
def test_only_compat_knows_classes_of_other_libraries_by_name(name):
    assert not {"bitsandbytes", "peft"} & {m.partition(".")[0] for m, _ in imports(FILES[name])}
    known = [w for w in words(FILES[name]) if re.match(r"bitsandbytes|Conv1D$|DynamicLayer$|BitsAndBytes|AdamW8bit", w)]
    quirks = [w for w in words(FILES[name]) if w in ("support_avx512bf16_for_cpu", "get_output_embeddings", ".lora_")]
    assert name == "compat" or not known + quirks
    if "peft" in words(FILES[name]):
        assert name.startswith("lm.adapters.")


def test_all_is_what_is_exposed():
    assert sorted(selfdoubt.__all__) == selfdoubt.__dir__() == sorted(set(selfdoubt.__all__))
    for name in selfdoubt.__all__:
        assert getattr(selfdoubt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        selfdoubt.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["lm", "lm.adapters", "train"])
def test_a_room_exposes_what_it_lists(package):
    module = importlib.import_module(f"selfdoubt.{package}")
    assert module.__all__ == module.__dir__()
    for name in module.__all__:
        assert getattr(module, name).__module__.startswith((f"selfdoubt.{package}.", "typing"))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


#: Rooms with a list of names; Ray's is tested where Ray runs.
LISTS = {n.removesuffix(".__init__") for n in FILES if n.endswith(".__init__")} - {"cli", "serve.ray"}


@pytest.mark.parametrize("package", sorted(LISTS))
def test_every_name_that_a_room_lists_can_be_imported(package):
    module = importlib.import_module(f"selfdoubt.{package}")
    for name in module.__all__:
        assert hasattr(module, name) or importlib.util.find_spec(f"selfdoubt.{package}.{name}"), name


@pytest.mark.parametrize("name", FILES)
def test_files_are_small_enough_to_read(name):
    text = FILES[name].read_text(encoding="utf-8")
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert len(text.splitlines()) <= (LONGEST_OF_A_CLASS if len(classes) == 1 else LONGEST)


def _has_pocket() -> bool:
    return all((ROOT / "pocket" / file).is_file() for file in ("model/model.safetensors", "voters/selfdoubt.json"))


@pytest.mark.parametrize("name", [n for n, p in FILES.items() if ">>>" in p.read_text(encoding="utf-8")])
def test_every_example_in_a_docstring_runs(name):
    if '"pocket"' in FILES[name].read_text(encoding="utf-8") and not _has_pocket():
        pytest.skip("the pocket model is not in this checkout")
    module = importlib.import_module(f"selfdoubt.{name}".removesuffix(".__init__"))
    results = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert results.attempted > 0
    assert results.failed == 0
