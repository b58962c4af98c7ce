"""The report's page in a real Chromium: no errors, no network; it sorts, filters, and runs nobody else's script."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selfdoubt.eval.records import Question, Record
from selfdoubt.eval.settings import Run
from selfdoubt.workflow import write_run_report
from tests.records import COSTS, judged, sample

pytestmark = pytest.mark.browser

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028&amp;"


def records():
    found = [replace(r, abstain=r.p_correct < 0.5) for r in judged(430)]
    found[7] = replace(found[7], samples=(sample(True, 0.25), sample(False, 0.5)))
    found.append(
        Record(
            Question("evil", EVIL, answers=(EVIL,), topic=EVIL, context=EVIL),
            EVIL,
            {"sum_nll": 1.0, "good": 1.0, "flat": 0.5, EVIL: 2.0},
            tokens=((EVIL[:9], 0.1), (EVIL[9:], 3.0)),
            samples=(sample(False, text=EVIL),),
            correct=False,
            p_correct=0.999,
            abstain=False,
            note=EVIL,
        )
    )
    found.append(replace(found[0], question=Question("late", "Too late?"), correct=None, note="timeout"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    write_run_report(records(), Run.parse({"model": EVIL, "data": "made up", "costs": COSTS}), place, draws=20)
    return place


@pytest.fixture
def page(browser, folder, request):
    options = getattr(request, "param", {})
    context = browser.new_context(**options)
    opened = context.new_page()
    heard, asked = [], []
    opened.on("console", lambda message: heard.append(message.text))
    opened.on("pageerror", lambda error: heard.append(str(error)))
    opened.on("request", lambda call: asked.append(call.url))
    opened.goto((folder / "report.html").as_uri())
    yield opened
    context.close()
    assert heard == []
    assert asked == [(folder / "report.html").as_uri()]


def names(page):
    return page.eval_on_selector_all("#scores tbody tr", "rows => rows.map(r => r.dataset.score)")


def listed(page, number):
    page.wait_for_function("n => document.getElementById('count').textContent.startsWith(n + ' of ')", arg=str(number))
    return page.locator("#answers > li")


def test_a_click_on_a_title_sorts_and_another_turns_it_round(page):
    assert names(page)[0] in ("p_correct", "good")
    title = page.locator("#scores thead th").filter(has_text="Score").first
    title.get_by_role("button").click()
    assert names(page) == sorted(names(page))
    assert title.get_attribute("aria-sort") == "ascending"
    title.get_by_role("button").click()
    assert names(page) == sorted(names(page), reverse=True)
    cost = page.locator("#scores thead th").filter(has_text="AURC").first
    cost.get_by_role("button").click()
    assert title.get_attribute("aria-sort") is None
    shown = page.eval_on_selector_all(
        "#scores tbody tr",
        "rows => rows.map(r => r.cells[[...r.closest('table').tHead.rows[0].cells].findIndex("
        "c => c.ariaSort)].dataset.v).filter(Boolean).map(Number)",
    )
    assert shown == sorted(shown)


def test_answers_are_filtered_and_shown_two_hundred_at_a_time(page):
    every = records()
    assert listed(page, len(every)).count() == 200
    page.locator("#more").click()
    page.locator("#more").click()
    assert listed(page, len(every)).count() == len(every)
    assert page.locator("#more").is_hidden()
    page.get_by_label("Judged").select_option("wrong")
    wrong = listed(page, sum(r.correct is False for r in every))
    assert wrong.first.locator(".wrong").count() == 1
    page.locator("select[name=topic]").select_option("=odd")
    listed(page, sum(r.correct is False and r.question.topic == "odd" for r in every))
    page.locator("select[name=topic]").select_option("")
    page.get_by_label("Judged").select_option("abstained")
    listed(page, sum(r.abstain is True for r in every))
    page.get_by_label("Judged").select_option("unjudged")
    assert "timeout" in listed(page, 1).first.inner_text()
    page.get_by_label("Judged").select_option("all")
    page.get_by_label("Search").fill("IS q17 what")
    assert {text.split("\n")[0] for text in listed(page, 11).all_inner_texts()} >= {"What is q17?", "What is q170?"}


def test_the_order_by_risk_is_that_of_the_score(page):
    page.get_by_label("Order").select_option("riskiest")
    listed(page, len(records()))
    page.wait_for_timeout(200)
    worst = max((r for r in records() if r.p_correct is not None), key=lambda r: 1 - r.p_correct)
    assert page.locator("#answers .ask").first.inner_text() == worst.question.text


def test_a_script_in_an_answer_stays_text(page):
    assert page.title() == f"selfdoubt: {EVIL} on made up"
    page.get_by_label("Search").fill("owned")
    row = listed(page, 1).first
    row.locator("summary").click()
    assert row.locator(".ask").text_content() == EVIL
    assert row.locator(".say").text_content() == EVIL
    assert row.locator(".t4").text_content() == EVIL[9:]
    assert row.locator("details").text_content().count(EVIL) == 3  # accepted, passage, drawn
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert "owned" in page.locator(".pair .answers").last.inner_text()  # among the safest wrong answers


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_a_phone_need_not_scroll_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_words_stand_out_from_their_ground_in_light_and_dark(page):
    """Contrast of at least 4.5 (WCAG 2, level AA), of the body, of what is faint, of verdicts and of tokens."""
    ratios = page.evaluate(
        """() => {
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const over = colours => {
            canvas.clearRect(0, 0, 1, 1);
            for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        return ['body', '.faint', '.right', '.wrong', '.t0', '.t1', '.t2', '.t3', '.t4'].map(where => {
            const style = getComputedStyle(document.querySelector(where));
            const ground = [getComputedStyle(document.body).backgroundColor, style.backgroundColor];
            const [a, b] = [light(over(ground)), light(over([...ground, style.color]))];
            return [where, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
        });
    }"""
    )
    assert len({round(ratio, 3) for _, ratio in ratios}) > 5  # the colours were understood
    assert {where: round(ratio, 2) for where, ratio in ratios if ratio < 4.5} == {}


@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_without_javascript_everything_but_the_list_is_there(page):
    assert page.locator("#scores tbody tr").count() > 2
    assert page.locator("svg.plot").count() == 2
    assert page.locator("#filters").is_hidden()
    assert page.locator("noscript").inner_text()


def test_a_screen_reader_finds_headings_headers_and_names_of_plots(page):
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("img", name="Accuracy against confidence percentile").count() == 1
    assert page.get_by_role("rowheader").count() > 5
    unnamed = page.eval_on_selector_all(
        "button, input, select", "all => all.filter(e => !(e.labels?.length || e.innerText)).length"
    )
    assert unnamed == 0


def test_a_screenshot_is_not_empty(page, tmp_path):
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
