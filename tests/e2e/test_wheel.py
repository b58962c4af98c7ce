"""The packages that a release uploads: built from this tree, looked into, installed and run away from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import selfdoubt

ROOT = Path(__file__).parents[2]
FRANCE = "What is the capital of France?"


def run(*command: str | Path, cwd: Path, typed: str | None = None) -> str:
    """The output of a command that cannot see this checkout; where lines are typed into it, its errors too."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=200, input=typed,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout if typed is None else done.stdout + done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packages")
    path = os.pathsep.join(p for p in sys.path if p and Path(p).resolve() != ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        cwd=folder, capture_output=True, text=True, check=False, timeout=200, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    return packages / f"selfdoubt-{selfdoubt.__version__}-py3-none-any.whl"


def install(wheel: Path, folder: Path) -> Path:
    """Make an empty environment with the wheel and nothing else, and return the folder of its packages."""
    venv.create(folder, symlinks=True)
    run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps",
        "--no-index", "--disable-pip-version-check", wheel, cwd=folder,
    )  # fmt: skip
    (site_packages,) = folder.glob("lib/python*/site-packages")
    return site_packages


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment into which the wheel was installed; what it needs it borrows from the one of the tests.

    Borrowed folders come last on the path and their ``.pth`` files are not read, so an editable install is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (install(wheel, folder) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n", encoding="utf-8")
    return folder


def list_requirements(lines: list[str]) -> set[str]:
    """Names of the packages that ``pip install`` brings for these requirements, without extras."""
    needed: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in needed or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:  # of another platform: a CPU build of torch needs less
            continue
        needed.add(name)
    return needed


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment after ``pip install selfdoubt``: the wheel and what it requires, as links, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    site_packages = install(wheel, folder)
    (information,) = site_packages.glob("selfdoubt-*.dist-info")
    lines = re.findall(r"^Requires-Dist: (.*)$", (information / "METADATA").read_text(encoding="utf-8"), flags=re.M)
    for name in list_requirements(lines):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            target = site_packages / top
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(top))))
    return folder


def test_the_wheel_holds_the_package_its_licences_and_the_pocket_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    information = f"selfdoubt-{selfdoubt.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"selfdoubt", information}
    assert {"selfdoubt/py.typed", f"{information}/licenses/LICENSE", f"{information}/licenses/NOTICE"} <= names
    pocket = {"model/config.json", "model/model.safetensors", "model/tokenizer.json"}
    pocket |= {"voters/selfdoubt.json", "voters/added.safetensors"}
    assert {f"selfdoubt/pocket/{name}" for name in pocket} <= names
    modules = {f"selfdoubt/{p.relative_to(ROOT / 'src' / 'selfdoubt')}" for p in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"tests", "recipes", "benchmarks", "experiments", "__pycache__"}


def test_the_source_distribution_holds_what_the_repository_holds_and_nothing_else(packages: Path) -> None:
    with tarfile.open(packages / f"selfdoubt-{selfdoubt.__version__}.tar.gz") as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout: there is nothing to compare with")
    tracked = listed()
    assert names - tracked - listed("--others", "--exclude-standard") == {"PKG-INFO"}
    assert tracked - names <= {".pre-commit-config.yaml"}


def listed(*options: str) -> set[str]:
    """Files that git lists, by their path in the repository; tracked ones without options."""
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


def test_an_installed_wheel_answers_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    file = run(installed / "bin" / "python", "-c", "import selfdoubt; print(selfdoubt.__file__)", cwd=tmp_path)
    assert Path(file.strip()).is_relative_to(installed)
    output = run(installed / "bin" / "selfdoubt", "ask", FRANCE, "--json", cwd=tmp_path)
    answer = json.loads(output.splitlines()[-1])
    assert answer["text"] == "The capital of France is Paris."
    assert 0 <= answer["percentile"] <= 1


def test_the_wheel_requires_three_packages() -> None:
    lines = [line for line in distribution("selfdoubt").requires or [] if "extra ==" not in line]
    assert {Requirement(line).name for line in lines} == {"torch", "safetensors", "jaxtyping"}


def test_what_needs_an_extra_names_it_in_one_message(bare: Path, tmp_path: Path) -> None:
    code = """
import sys, selfdoubt
from selfdoubt import density, interpret, risk, sample, sculpt, vote
needs = {"metrics": "qa", "RiskAwareLM": "lm", "evaluate": "qa", "calibrate": "qa", "prepare": "lm"}
for name, extra in needs.items():
    try:
        getattr(selfdoubt, name)
    except selfdoubt.errors.MissingExtraError as error:
        assert str(error).endswith(f'pip install "selfdoubt[{extra}]"'), error
    else:
        raise SystemExit(f"{name} needs nothing")
try:
    from selfdoubt.metrics import prr
except selfdoubt.errors.MissingExtraError as error:
    assert "numpy" in str(error), error
else:
    raise SystemExit("metrics need nothing")
assert not {"numpy", "transformers"} & set(sys.modules)
"""
    run(bare / "bin" / "python", "-c", code, cwd=tmp_path)


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("code", [c for c in README if "RiskAwareLM" not in c], ids=lambda c: c.split()[-1])
def test_the_readmes_python_can_be_pasted_after_installing_the_wheel_alone(
    bare: Path, tmp_path: Path, code: str
) -> None:
    """Line by line into an interactive interpreter, which goes on after an error."""
    output = run(bare / "bin" / "python", "-q", "-i", cwd=tmp_path, typed=f"{code}\nprint('at the', 'end')\n")
    assert "at the end" in output
    assert "Error" not in output, output


def test_the_readme_has_python_for_any_module_a_table_and_images() -> None:
    assert len([c for c in README if "RiskAwareLM" not in c]) == 3
