"""Other people's implementations, to compare with.

``make .venv/.dev`` installs what ``tests/oracles.txt`` pins into a folder of its own, without the versions those
packages ask for: their pins contradict each other and ours. The folder comes last on the path: it hides nothing.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

FOLDER = Path(sys.prefix) / "oracles"


def load(name: str) -> ModuleType:
    """A module of an oracle, as ``import name`` would give it."""
    if not FOLDER.is_dir():
        raise ImportError(f"the tests compare with packages that are not in {FOLDER}; run: make .venv/.dev")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        return importlib.import_module(name)


def load_alone(name: str) -> ModuleType:
    """The same, but the ``__init__`` of the packages around it is not run, where it would import half the world."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            spec = ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations = [str(FOLDER.joinpath(*parts[:depth]))]
            sys.modules[package] = module_from_spec(spec)
    return load(name)


def load_estimator(name: str) -> ModuleType:
    """A file of ``lm_polygraph.estimators``."""
    load_alone("lm_polygraph.utils.common")  # else the estimators' base and the rest of the package import each other
    return load_alone(f"lm_polygraph.estimators.{name}")
