"""The report's files: whole, self-contained, safe, and what is in them."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfdoubt import report as package
from selfdoubt.errors import DataError
from selfdoubt.eval.records import Question
from selfdoubt.eval.settings import Run
from selfdoubt.lm.risk_levels import BOUNDS, COLOURS, find_risk_level
from selfdoubt.metrics import Estimate
from selfdoubt.report import png
from selfdoubt.report.html.page import embed_json, render_page
from selfdoubt.report.html.svg import Series, draw_plot
from selfdoubt.report.html.tables import render_cell
from selfdoubt.report.measure import measure_answers
from selfdoubt.report.results import Report
from selfdoubt.report.write import read_report
from selfdoubt.workflow import write_run_report
from tests.records import COSTS, judged, record, sample

VOID = {"meta", "br", "input", "wbr", "img", "link", "hr"}


class Tags(HTMLParser):
    """Every element, if each is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def records():
    found = [replace(r, abstain=r.p_correct < 0.5) for r in judged(60)]
    found[3] = replace(found[3], samples=(sample(True, 0.2), sample(False, 0.4)), percentile=0.25)
    return found


@pytest.fixture(scope="module")
def report(records):
    return measure_answers(records, Run.parse({"model": "pocket", "data": "made up", "costs": COSTS}), draws=20)


def test_all_files_are_written_and_nothing_else(records, tmp_path):
    found = write_run_report(records, Run(), tmp_path / "new" / "folder", draws=5).files
    assert set(found) == {"report.json", "report.html", *png.NAMES}
    assert sorted(found.values()) == sorted((tmp_path / "new" / "folder").iterdir())
    assert json.loads(found["report.json"].read_text(encoding="utf-8"))["counts"]["asked"] == 60


def test_the_same_answers_give_the_same_bytes(records, tmp_path):
    one, two = (write_run_report(records, Run(), tmp_path / name, draws=5).files for name in "ab")
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)


def test_a_plot_of_an_earlier_report_does_not_stay(records, tmp_path):
    write_run_report(records, Run(), tmp_path, draws=5)
    found = write_run_report([replace(r, correct=None) for r in records], Run(), tmp_path, draws=5).files
    assert set(found) == {"report.json", "report.html"}
    assert sorted(tmp_path.iterdir()) == sorted(found.values())


def test_all_is_what_the_package_exposes():
    assert all(getattr(package, name).__module__.startswith("selfdoubt.report.") for name in package.__all__)
    assert dir(package) == sorted(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_a_report_comes_back_from_its_file(records, report, tmp_path):
    settings = {"model": "pocket", "data": "made up", "costs": COSTS}
    write_run_report(records, Run.parse(settings), tmp_path, draws=20)
    assert read_report(tmp_path) == report


def test_a_broken_report_is_named_with_the_entry(report, tmp_path):
    entries = report.to_json()
    for broken, message in (
        ({**entries, "format": 2}, r"format 1, found 2; report again"),
        ({**entries, "draws": "20"}, r"report\.draws must be of type int, found '20'; report again"),
        ({**entries, "counts": {}}, r"report\.counts\.asked is missing; report again"),
        ({**entries, "accuracy": 0.5}, r"report\.accuracy must be an object, found 0\.5; report again"),
        ({**entries, "topics": {}}, r"report\.topics must be a list"),
        ({**entries, "verdict": {**entries["verdict"], "low_risk_is_right": "so"}}, r"must be 'yes' or 'no' or 'open'"),
        ([], r"found 'list'"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message) as caught:
            read_report(tmp_path)
        assert str(tmp_path / "report.json") in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_report(tmp_path / "nowhere")


PROMISE = {
    "threshold": 0.7, "target_accuracy": 0.9, "confidence": 0.95, "coverage": 0.5, "answers": 100, "answered": 50,
    "right": 48, "bound": 0.9012,
}  # fmt: skip


def test_the_guarantee_of_a_calibration_is_printed_in_the_verdict_and_on_the_page(records):
    report = measure_answers(records, Run(threshold=0.7, promise=PROMISE), draws=5)
    promise = "at least 90 % right, with confidence 95 %, on questions like those it was set with."
    answered = [r for r in records if not r.abstain]
    sentence = next(s for s in report.verdict.sentences if s.startswith("The threshold of p_correct >= 0.700 answers"))
    assert f"answers {len(answered)} of 60 questions; " in sentence
    assert sentence.endswith(f"It promises {promise}")
    text = html.unescape(render_page(records, report)).replace("\xa0", " ")
    table = re.search(r"<h2>Abstention</h2><p>(.*?)</p>", text)[1]
    assert table.startswith(f"The threshold at p_correct of 0.700 answers {len(answered)} of 60 questions.")
    assert table.endswith(f"It promises {promise}")
    for run in (Run(), Run(threshold=0.7)):
        assert not any("promises" in s for s in measure_answers(records, run, draws=5).verdict.sentences)


def test_a_report_from_before_there_were_utilities_is_still_read(records):
    old = measure_answers([replace(r, abstain=r.p_correct < 0.7) for r in records], Run(), draws=20).to_json()
    assert old.pop("utilities")
    assert old["abstention"].pop("metrics")
    report = Report.parse(old)
    assert report.utilities == ()
    assert report.abstention.metrics is None
    assert "Worth per question" not in render_page(records, report)


def test_the_page_shows_what_abstaining_is_worth(records):
    decided = [replace(r, abstain=r.p_correct < 0.7) for r in records]
    report = measure_answers(decided, Run(threshold=0.7), draws=20)
    page = render_page(decided, report)
    assert f"{report.abstention.metrics['omniscience_index'].value:.3f}" in page
    assert f"{report.utilities[-1].rule.value:+.3f}" in page
    assert "At the<br>threshold" in page
    undecided = [replace(r, abstain=None) for r in records]
    plain = render_page(undecided, measure_answers(undecided, Run(), draws=20))
    assert "Worth per question" in plain
    assert "At the<br>threshold" not in plain


def test_percentiles_of_a_report_are_called_confidence_percentiles(records, report):
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", render_page(records, report), flags=re.S)
    assert text.count("percentile") == text.count("confidence percentile") > 3


def test_without_records_nothing_is_written(tmp_path):
    with pytest.raises(DataError):
        write_run_report([], Run(), tmp_path / "out", draws=5)
    assert not (tmp_path / "out").exists()


def test_pictures_are_large_enough_for_print(report):
    for data in png.draw_pictures(report).values():
        image = Image.open(BytesIO(data))
        assert image.width >= 1000
        assert round(image.info["dpi"][0]) == 200


@pytest.mark.parametrize("what", ["all", "unjudged", "right", "one", "bare"])
def test_the_page_is_well_formed_whatever_is_missing(records, what):
    ways = {
        "all": records,
        "unjudged": [replace(r, correct=None, note="no judge") for r in records],
        "right": [replace(r, correct=True) for r in records],
        "one": records[:1],
        "bare": [record(f"q{i}", None, answer=None, scores={}, note="failed") for i in range(3)],
    }
    report = measure_answers(ways[what], Run(), draws=5)
    assert Report.parse(json.loads(json.dumps(report.to_json()))) == report
    text = render_page(ways[what], report)
    tags = Tags(text)
    assert [tag for tag, _ in tags.found].count("h1") == 1
    assert not re.search(
        r"\bnan\b|\bNone\b|\binf\b", re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.S)
    )


def test_the_page_asks_nothing_of_a_network(records, report):
    text = render_page(records, report)
    tags = Tags(text)
    assert not [a for _, attributes in tags.found for a in attributes if a in ("src", "href", "style", "onclick")]
    assert not re.search(r"https?://|@import|url\(|fetch\(|innerHTML", text)
    policy = next(a["content"] for tag, a in tags.found if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


EVIL = [
    "<script>alert(1)</script>", "</script>", "<!--", "]]>", '" data-evil="', "' data-evil='", "&lt;", "\u2028\u2029",
]  # fmt: skip


def test_what_others_wrote_is_text_everywhere(records):
    for evil in EVIL:
        named = replace(
            judged(1)[0], question=Question(evil, evil, evil, (evil,), topic=evil), answer=evil, note=evil,
            scores={"sum_nll": 9.0, evil: 3.0}, tokens=((evil, 5.0),), samples=(sample(True, text=evil),),
        )  # fmt: skip
        unjudged = replace(named, question=replace(named.question, id=f"{evil}2"), correct=None)
        more = [*(replace(r, scores={**r.scores, evil: float(i)}) for i, r in enumerate(records)), named, unjudged]
        text = render_page(more, measure_answers(more, Run.parse({"model": evil, "data": evil, evil: evil}), draws=5))
        tags = Tags(text)
        assert [tag for tag, _ in tags.found].count("script") == 2
        assert not [a for _, attributes in tags.found for a in attributes if a == "data-evil"]
        assert html.escape(evil) in text
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        assert json.loads(data[1])["answers"][-1]["a"] == evil


@given(st.text(st.characters(codec=None)))
def test_embedded_json_comes_back_and_holds_nothing_that_ends_a_script(text):
    found = embed_json({"a": text})
    assert json.loads(found) == {"a": text}
    assert found.isascii()
    assert not set(found) & set("<>&")


def test_half_a_character_does_not_stop_a_report(tmp_path):
    broken = record("a", answer="\ud83d", tokens=(("\ud83d", 1.0),))
    files = write_run_report([broken, *judged(10)], Run(), tmp_path, draws=5).files
    assert files["report.html"].read_text(encoding="utf-8")


def test_surprises_are_the_riskiest_right_and_the_safest_wrong(records, report):
    text = render_page(records, report)
    right = max((r for r in records if r.correct), key=lambda r: 1 - r.p_correct)
    wrong = min((r for r in records if not r.correct), key=lambda r: 1 - r.p_correct)
    first, second = re.findall(r"<h3>.*?</h3><ul class=\"answers\"><li>(.*?)</li>", text)
    assert right.question.text in first
    assert wrong.question.text in second


def test_tokens_have_the_colours_of_the_terminal(report):
    pytest.importorskip("rich")
    from selfdoubt.cli.terminal import LEVEL_STYLES

    assert [style.color.name for style in LEVEL_STYLES] == list(COLOURS)
    assert len(COLOURS) == len(BOUNDS) + 1
    tokens = tuple((f"w{i} ", b + 0.01) for i, b in enumerate((0.0, *BOUNDS)))
    whole = "".join(text for text, _ in tokens)
    more = [replace(r, answer=whole, tokens=tokens) for r in judged(60)]
    text = render_page(more, report)
    for i, (word, risk) in enumerate(tokens):
        assert find_risk_level(risk) == i
        assert f'<span class="t t{i}" title="{risk:.3f} nats">{word}</span>' in text


def test_tokens_that_are_not_the_answer_are_not_shown_for_it(report):
    more = [replace(r, answer="A", tokens=(("B", 1.0),)) for r in judged(60)]
    text = render_page(more, report)
    assert '"t":' not in text
    assert '<p class="say" dir="auto">A</p>' in text


def test_a_number_that_is_none_says_why():
    assert render_cell(Estimate.missing('all "right"')) == '<td title="all &quot;right&quot;">-</td>'


def test_the_page_says_first_what_the_numbers_decide(records, report):
    text = render_page(records, report)
    said = re.search(r'<section class="verdict".*?</section>', text, re.S)[0]
    found = [html.unescape(s).replace("\xa0", " ") for s in re.findall("<p>(.*?)</p>", said)]
    assert found == list(report.verdict.sentences)


def test_lines_lie_in_the_picture_at_their_place():
    text = draw_plot([Series("a<b", [0, 0.5, 1], [0, 1, 0.5])], title="t", description="d", x_label="x", y_label="y")
    path = re.search(r'class="line main" d="M(.*?)"', text)[1]
    points = [tuple(map(float, pair.split())) for pair in path.split("L")]
    assert points == [(78.0, 298.0), (292.0, 12.0), (506.0, 155.0)]
