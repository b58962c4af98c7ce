"""The documentation site is built without a warning, complete, up to date with the code, and readable offline."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

import selfdoubt
from selfdoubt import density, errors, interpret, lm, metrics, sample, sculpt, vote
from selfdoubt.eval.scores.agreement import AGREEMENT_SCORES
from selfdoubt.lm.scores import ANSWER_SCORES, RANK_SCORES, Score
from tests.browser import chromium

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
PICTURES = sorted(DOCS.glob("pictures/*"))
PAGES = sorted(DOCS.rglob("*.md"))


def load(name: str) -> ModuleType:
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site") / "some folder"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Addresses(HTMLParser):
    """What a page loads, where it links to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def addresses(site: Path) -> dict[Path, Addresses]:
    """Of each page of the site."""
    return {page: Addresses(page) for page in sorted(site.rglob("*.html"))}


def test_every_page_is_there(addresses: dict[Path, Addresses], site: Path) -> None:
    built = {page.relative_to(site).as_posix() for page in addresses}
    written = {p.relative_to(DOCS).with_suffix(".html").as_posix() for p in [*PAGES, *NOTEBOOKS]}
    assert written <= built
    assert {
        "architecture.html",
        "benchmarks.html",
        "contributing.html",
        "log.html",
        "search/search_index.js",
    } <= built | {p.relative_to(site).as_posix() for p in site.rglob("*.js")}


def test_nothing_is_loaded_from_elsewhere(addresses: dict[Path, Addresses], site: Path) -> None:
    for page, found in addresses.items():
        for address in found.loads:
            assert not re.match(r"(https?:)?//|/", address), f"{page.name} loads {address}"
            if not address.startswith("data:"):
                assert (page.parent / unquote(urldefrag(address)[0].partition("?")[0])).exists(), (
                    f"{page.name}: {address}"
                )
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(.?https?:|@import", style.read_text(encoding="utf-8")), style.name


def test_every_link_leads_to_a_page_and_an_anchor(addresses: dict[Path, Addresses], site: Path) -> None:
    checked = 0
    for page, found in addresses.items():
        for link in found.links:
            if re.match(r"https?:|mailto:", link):
                continue
            address, anchor = urldefrag(link)
            target = (page.parent / unquote(address)).resolve() if address else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()) or target == page, f"{page.name}: {link} leads out of the site"
            assert target.exists(), f"{page.name}: no file for {link}"
            if anchor and target.suffix == ".html":
                there = addresses.get(target) or next(a for p, a in addresses.items() if p.resolve() == target)
                assert unquote(anchor) in there.anchors, f"{page.name}: no anchor for {link}"
            checked += 1
    assert checked > 2000


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    texts = {page.name: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    assert all("arithmatex" not in text for text in texts.values())
    assert all(
        texts[f"{name}.html"].count("<math") >= 1 for name in ("vote", "sample", "sculpt", "density", "concepts")
    )
    assert not [name for name, text in texts.items() if re.search(r"\\(frac|operatorname|sum|text)\b", text)]


def public_names() -> Iterator[str]:
    """Full names of all that the reference must have."""
    homes = {
        "evaluate": "selfdoubt.workflow",
        "calibrate": "selfdoubt.workflow",
        "prepare": "selfdoubt.preparation.run",
    }
    for name in selfdoubt.__all__:
        thing = getattr(selfdoubt, name)
        if not isinstance(thing, ModuleType) and name not in ("__version__", "SelfdoubtError"):
            yield f"{homes.get(name, thing.__module__)}.{name}"
    for module in (vote, sample, sculpt, density):
        yield f"{module.__name__}.Wrapper"
    for room in (metrics, interpret):
        for name in room.__all__:
            thing = getattr(room, name)
            if callable(thing) and getattr(thing, "__module__", "").startswith("selfdoubt."):
                yield f"{thing.__module__}.{name}"
    for name in ("RiskAwareLM", "Options", "Answer", "Token", "Stream", "Calibration"):
        yield f"{getattr(lm, name).__module__}.{name}"
    yield from (
        "selfdoubt.train.run.fit",
        "selfdoubt.train.config.TrainConfig",
        "selfdoubt.serve.http.settings.ServerSettings",
    )
    yield from (
        f"selfdoubt.risk.{name}" for name in ("mix", "total", "aleatoric", "epistemic", "token_scores", "percentile")
    )


def test_the_reference_has_every_public_name(addresses: dict[Path, Addresses]) -> None:
    anchors = set().union(*(found.anchors for page, found in addresses.items() if page.parent.name == "api"))
    assert sorted(set(public_names()) - anchors) == []


def test_examples_of_the_reference_are_code(site: Path) -> None:
    texts = [page.read_text(encoding="utf-8") for page in sorted(site.glob("api/*.html"))]
    assert sum(text.count("&gt;&gt;&gt;") for text in texts) > 50
    assert not any("<blockquote>" in text for text in texts)


def test_each_score_has_its_formula() -> None:
    tables = load("tables")
    alone = [name for name, score in ANSWER_SCORES.items() if not isinstance(score, Score)]
    signals = {score.signal for score in ANSWER_SCORES.values() if isinstance(score, Score)}
    assert set(tables.SIGNALS) == signals
    assert sorted(tables.SCORES) == sorted([*alone, *RANK_SCORES, *AGREEMENT_SCORES, "p_false"])


def test_tables_are_up_to_date() -> None:
    tables = load("tables")
    for page in tables.TABLES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert text == tables.update(page, text), "run python docs/tables.py"


def test_the_worth_of_a_score_is_that_of_the_results() -> None:
    """By hand: means of the committed numbers of one score, and of the one that it is compared with."""
    rows = json.loads((ROOT / "benchmarks/results/real-cpu.json").read_text(encoding="utf-8"))["rows"]
    free = ("webquestions", "nq", "squad2", "truthfulqa")
    means = {}
    for score, arm in (("rank_joint", "prepared"), ("sum_nll", "prepared")):
        values = [
            r["value"]
            for r in rows
            if (r.get("score"), r["arm"], r["metric"]) == (score, arm, "prr") and r["set"] in free
        ]
        means[score] = sum(values) / len(values)
    text = (DOCS / "scores.md").read_text(encoding="utf-8")
    assert f"| `rank_joint` | prepared | {means['rank_joint']:.2f} | {means['sum_nll']:.2f} |" in text
    about = ("all", "rank_joint", "prepared", "prr less sum_nll's")
    (gain,) = (r for r in rows if (r["model"], r.get("score"), r["arm"], r["metric"]) == about)
    low, high = gain["interval"]
    said = f"{gain['value']:.3f} PRR (95 % interval {low:.3f} to {high:.3f})"
    assert said in (DOCS / "llm.md").read_text(encoding="utf-8")


def test_every_error_has_an_entry_with_a_message() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    tree = str(errors.__doc__).partition("\n\n")[2].strip()
    assert tree in page
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.SelfdoubtError)]
    roots = {errors.SelfdoubtError, errors.ServingError}
    assert len(kinds) == 18
    for kind in kinds:
        section = re.search(rf"\n##+ {kind.__name__}\n(.*?)(?=\n##|\Z)", page, flags=re.S)
        assert section is not None, kind
        assert kind in roots or f"\n{kind.__name__}: " in section[1], f"{kind.__name__} shows no message"
    assert all(warning.__name__ in page for warning in (errors.SlowWarning, errors.UntrainedWarning))


def test_every_picture_is_drawn_by_the_script_and_shown() -> None:
    pictures = load("pictures")
    shown = set(
        re.findall(r"pictures/(\w+\.\w+)", "".join(p.read_text(encoding="utf-8") for p in [*PAGES, DOCS / "hooks.py"]))
    )
    assert {p.name for p in PICTURES} == shown
    drawn = re.findall(r'with picture\("(\w+)"', (DOCS / "pictures.py").read_text(encoding="utf-8"))
    assert sorted(f"{name}.svg" for name in drawn) == sorted(shown)
    assert all(p.stat().st_size < 300_000 for p in PICTURES)
    rooms = {p.parent.name for p in (ROOT / "src/selfdoubt").glob("*/__init__.py")} - {"pocket"}
    assert rooms <= set(pictures.ROOMS), "draw the new rooms: python docs/pictures.py architecture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "notebooks.py", path.stem, "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_as_the_script_writes_them(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        f"run python docs/notebooks.py {path.stem}"
    )
    prints = [cell for cell in cells if re.search(r"^(    )*(print|plt\.show)\(", "".join(cell["source"]), flags=re.M)]
    assert prints
    assert all(cell["outputs"] for cell in prints)
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert path.stat().st_size < 200_000


def test_there_are_three_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.browser
def test_pages_in_a_browser(site: Path) -> None:
    """Opened from a disk, as wide as a desktop and as a phone, light and dark: nothing fails or sticks out."""
    sync = pytest.importorskip("playwright.sync_api")
    names = (
        "index",
        "tour",
        "concepts",
        "vote",
        "scores",
        "errors",
        "serve",
        "api/wrappers",
        "notebooks/any_model",
        "architecture",
    )
    faults: list[str] = []

    def note_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            faults.append(request.url)

    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, scheme, used in ((1280, "light", "default"), (390, "dark", "slate")):
            context = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme, offline=True)
            page = context.new_page()
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", note_request)
            for name in names:
                page.goto((site / f"{name}.html").as_uri())
                page.wait_for_load_state("load")
                assert page.evaluate("document.body.dataset.mdColorScheme") == used
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} sticks out at {width}"
                broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
                assert page.evaluate(broken) == [], name
            context.close()
        assert faults == []
        page = browser.new_context(offline=True, viewport={"width": 1280, "height": 850}).new_page()
        page.goto((site / "index.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("Mahalanobis")
        result = page.locator(".md-search-result__link").first
        result.wait_for()
        assert "density" in str(result.get_attribute("href"))
        browser.close()
