"""The chat page in a real Chromium, with the pocket model behind it, slowed down so that one can watch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from selfdoubt import pocket
from selfdoubt.preparation import PreparationConfig, prepare
from tests.browser import chromium
from tests.waiting import wait_until

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> **bold** &amp;"
#: A model that sleeps before each step and, asked to go on, never stops; and an address that tells what became of the
#: requests.
SERVER = """
import sys
import time

calls = []
events = ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, args: calls.append(repr(args)) if event in events else None)

from fastapi import FastAPI
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.serve.chat import mount
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.http.process import bind_socket, format_url, run_server

lm = RiskAwareLM.load("pocket", dtype="float32")  # the same answers on every machine
lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
engine, jobs, app = Engine(lm), [], FastAPI()
ask = engine.generate

def remembered(messages, **options):
    stops = lm.stop_ids
    if messages[-1]["content"].startswith("Go on"):
        lm.stop_ids = frozenset()
    try:
        jobs.append(ask(messages, **options))
    finally:
        lm.stop_ids = stops
    return jobs[-1]

engine.generate = remembered
app.get("/jobs")(lambda: [{"cancelled": j.cancelled, "ended": j.ended} for j in jobs])
app.get("/calls")(lambda: calls)
mount(app, engine)
engine.start()
listener = bind_socket("127.0.0.1", 0, keys=False)
url = format_url(listener)
run_server(app, listener, engine, drain=5, started=lambda: print(f"{url}/", flush=True))
"""


@pytest.fixture(scope="module")
def url():
    chromium()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            assert server.wait(30) == 0


WINDOW = {"viewport": {"width": 1180, "height": 820}}


@pytest.fixture(scope="module")
def window(browser):
    """One browser window for the tests that want nothing special: what it has loaded once it need not load again."""
    context = browser.new_context(**WINDOW)
    yield context
    context.close()


@pytest.fixture
def page(browser, window, url, request):
    """A fresh tab; at the end nothing may have been said on the console, and no other host asked."""
    special = getattr(request, "param", None)
    context = window if special is None else browser.new_context(**{**WINDOW, **special})
    context.set_default_timeout(60_000)
    opened = context.new_page()
    heard, asked = [], []
    opened.on("console", lambda message: heard.append(message.text))
    opened.on("pageerror", lambda error: heard.append(str(error)))
    opened.on("request", lambda call: asked.append(call.url))
    visit(opened, url)
    yield opened
    opened.close()
    if special is not None:
        context.close()
    assert heard == []
    assert [a for a in asked if not a.startswith((url, "blob:"))] == []


def visit(page, url):
    page.goto(url)
    page.get_by_role("heading", name="selfdoubt").wait_for()
    box(page).wait_for()
    page.locator("#sd-turns .example").first.wait_for()


def box(page):
    return page.get_by_label("Your question", exact=True)


def type_and_ask(page, question):
    box(page).fill(question)
    box(page).press("Enter")


def ended(page, n=1, state="done"):
    """The n-th turn, when it has ended."""
    turn = page.locator(".turn").nth(n - 1)
    page.locator(f".turn:nth-child({n})[data-state={state}]").wait_for()
    page.locator("#sd-send").wait_for()
    return turn


def ask(page, question, n=1):
    type_and_ask(page, question)
    return ended(page, n)


def set_slider(page, name, value):
    field, slider = (page.get_by_label(f"{kind} for {name}") for kind in ("number input", "range slider"))
    for _ in range(20):  # a page that is not quite there yet forgets what was typed
        field.fill(str(value))
        field.press("Tab")
        if slider.input_value() == str(value):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{name} stays at {slider.input_value()}")


def more_settings(page):
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Seed").wait_for()


def text_of(locator):
    return locator.evaluate("e => e.textContent")


def test_tokens_come_one_by_one_each_in_its_colour(page):
    type_and_ask(page, "Go on.")
    growing = page.locator(".turn[data-state=running] .say .t")
    counts = []
    for n in (3, 6, 9):  # tokens are there, and more come, before the end
        growing.nth(n - 1).wait_for()
        counts.append(growing.count())
    classes = growing.evaluate_all("all => all.map(t => t.className)")
    assert all(re.fullmatch(r"t t[0-4]( part)?", c) for c in classes)
    assert page.locator(".turn[data-state=running] .plot svg").count() == 1
    page.get_by_role("button", name="Stop").click()
    assert ended(page, state="stopped").locator(".say .t").count() >= max(counts) >= 9


def test_a_known_and_a_doubtful_token_differ_in_colour_and_the_verdict_in_words(page):
    turn = ask(page, "In which country is Issaquah?")
    assert text_of(turn.locator(".say")) == "The city of Issaquah is in Egypt."
    assert turn.locator(".say .t0", has_text="city").count() == 1
    assert turn.locator(".say .t3", has_text="Egypt").count() == 1
    words = turn.locator(".words").inner_text()
    assert re.match(r"Right with \d % · riskier than 9\d % of the reference answers · the calibrated", words)
    assert turn.locator(".ask .t4").count() > 0
    assert text_of(turn.locator(".ask")) == "In which country is Issaquah?"


def test_pointing_at_a_token_shows_its_numbers_and_escape_closes_them(page):
    turn = ask(page, "Where is Valencia?")
    token = turn.locator(".say .t", has_text="Venezuela")
    token.hover()
    card = page.get_by_role("tooltip")
    logprob, total, epistemic, aleatoric, disagreement, *_ = json.loads(token.get_attribute("data-d"))
    for name, value in {"logprob": logprob, "total": total, "epistemic": epistemic, "aleatoric": aleatoric}.items():
        assert card.locator(f"[data-name={name}]").inner_text() == f"{value:.3f}"
    assert card.locator("[data-name=disagreement]").inner_text() == f"{disagreement:.1%}".replace("%", " %")
    others = card.locator("li").all_inner_texts()
    assert any("Spain" in o and "%" in o for o in others)
    page.keyboard.press("Escape")
    assert card.count() == 0 or card.is_hidden()


def test_pointing_at_a_bar_points_at_its_token(page):
    turn = ask(page, "Where is Valencia?")
    n = turn.locator(".say .t").count()
    canvas = turn.locator(".plot .canvas")
    place = canvas.bounding_box()
    page.mouse.move(place["x"] + place["width"] * (2.5 / n), place["y"] + 20)
    page.locator(".say .t.on").wait_for()
    assert turn.locator(".say .t").nth(2).evaluate("t => t.classList.contains('on')")
    assert turn.locator(".plot .cursor").count() == 1


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.type("Where is Valencia?")  # the field has the focus from the start
    page.keyboard.press("Enter")
    turn = ended(page)
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.closest('.say') !== null"):
            break
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    last = turn.locator(".say .t").count() - 1
    assert page.evaluate("document.activeElement.dataset.k") == str(last)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.k") == "1"
    card = page.locator("#sd-card")
    assert card.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "sd-card"
    assert re.match(r"city: probability .*%, \w+", page.evaluate("document.activeElement.ariaLabel"))
    page.keyboard.press("Escape")
    assert card.is_hidden()
    page.keyboard.press("Enter")
    assert card.is_visible()
    page.keyboard.press("Shift+Tab")  # to the question's own tokens
    assert page.evaluate("document.activeElement.closest('.ask') !== null")


#: Keeps all that the page receives; streams that the page ends early are no news.
LISTEN = """() => {
    const ask = window.fetch;
    window.received = '';
    async function keep(body) {
        const reader = body.getReader(), text = new TextDecoder();
        for (let part; !(part = await reader.read()).done;) window.received += text.decode(part.value);
    }
    window.fetch = async (...call) => {
        const reply = await ask(...call);
        keep(reply.clone().body).catch(() => {});
        return reply;
    };
}"""


def test_an_answer_that_is_not_sure_enough_is_withheld_and_never_sent(page, url):
    page.evaluate(LISTEN)
    page.get_by_role("button", name="Use the recommended 64 %").click()
    type_and_ask(page, "In which country is Zorbelheim?")
    turn = ended(page)
    assert turn.locator(".unsure").inner_text() == "I'm not sure."
    assert "is right with 44 %, and you ask for at least 64 %" in turn.inner_text()
    received = page.evaluate("received")
    assert "Zorbelheim" in received
    assert "Thinking: " in received
    assert "Germany" not in received
    assert turn.locator(".say").count() == 0
    assert turn.locator(".plot svg").count() == 1
    turn.get_by_role("button", name="Show anyway").click()
    turn.locator(".say").wait_for()
    assert text_of(turn.locator(".say")) == "The city of Zorbelheim is in Germany."
    assert "Germany" in page.evaluate("received")
    sure = ask(page, "What is the capital of France?", 2)
    assert text_of(sure.locator(".say")) == "The capital of France is Paris."


def test_stop_ends_the_answer_at_once_and_keeps_what_there_is(page, url):
    type_and_ask(page, "Go on.")
    page.locator(".say .t").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    turn = ended(page, state="stopped")
    assert "Stopped" in turn.inner_text()
    assert 3 < turn.locator(".say .t").count() < 256
    assert jobs(url)[-1]["cancelled"]


def jobs(url):
    with urllib.request.urlopen(url + "jobs") as answer:
        return json.load(answer)


def test_the_server_calls_nobody(page, url):
    ask(page, "What is the capital of France?")
    with urllib.request.urlopen(url + "calls") as answer:
        calls = json.load(answer)
    assert calls  # its own address was looked up, at least
    assert [c for c in calls if "127.0.0.1" not in c] == []


def test_closing_the_tab_cancels_its_request(page, browser, url):
    context = browser.new_context()
    tab = context.new_page()
    visit(tab, url)
    before = len(jobs(url))
    type_and_ask(tab, "Go on.")
    tab.locator(".say .t").first.wait_for()
    context.close()
    wait_until(lambda: jobs(url)[before]["cancelled"])


def test_retry_draws_another_answer_and_edit_asks_another_question(page):
    turn = ask(page, "Where is Valencia?")
    turn.get_by_role("button", name="Retry").click()
    page.locator(".turn[data-turn='2'][data-state=done]").wait_for()
    turn = ended(page)
    assert "drawn at temperature 1, seed 1" in turn.inner_text()
    turn.get_by_role("button", name="Edit").click()
    page.locator(".turn.editing").wait_for()
    assert box(page).input_value() == "Where is Valencia?"
    box(page).fill("Where is Amstelveen?")
    box(page).press("Enter")
    page.locator(".turn[data-turn='3'][data-state=done]").wait_for()
    assert page.locator(".turn").count() == 1
    assert "Amstelveen is in the Netherlands" in text_of(ended(page).locator(".say"))


def test_several_candidates_come_the_least_doubtful_first(page):
    turn = ask(page, "Where is Valencia?")
    turn.get_by_role("button", name="Show candidates").click()
    page.locator(".turn[data-turn='2'][data-state=done]").wait_for()
    turn = ended(page)
    assert turn.locator(".take").count() == 5
    sure = [float(w) for w in turn.locator(".gauge i").evaluate_all("all => all.map(i => parseFloat(i.style.width))")]
    assert sure == sorted(sure, reverse=True)
    assert turn.locator(".take").first.locator(".t").count() > 3


def test_trying_until_sure_tells_how_many_tries_it_took(page):
    more_settings(page)
    set_slider(page, "Most tries until sure", 3)
    turn = ask(page, "In which country is Zorbelheim?")
    turn.get_by_role("button", name="Try until sure").click()
    page.locator(".turn[data-turn='2'][data-state=done]").wait_for()
    said = ended(page).locator(".status").inner_text()
    assert re.fullmatch(r"Sure enough after (1 try|\d tries; the best .*)|After 3 tries not sure enough: .*", said)


def test_two_tabs_do_not_know_of_each_other(page, url):
    other = page.context.new_page()
    visit(other, url)
    type_and_ask(page, "What is the capital of France?")
    type_and_ask(other, "What is the capital of Japan?")
    assert "Paris" in text_of(ended(page).locator(".say"))
    assert "Tokyo" in text_of(ended(other).locator(".say"))
    assert page.locator(".turn").count() == other.locator(".turn").count() == 1


@pytest.mark.parametrize("page", [{"viewport": {"width": 390, "height": 844}, "has_touch": True}], indirect=True)
def test_on_a_phone_nothing_scrolls_sideways_and_a_tap_shows_the_card(page):
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= 390
    turn = ask(page, "Where is Valencia?")
    assert page.evaluate(wide) <= 390
    turn.locator(".say .t").first.tap()
    card = page.locator("#sd-card").bounding_box()
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= 390
    page.keyboard.press("Escape")
    settings = page.get_by_role("button", name="Settings", exact=True)
    assert page.get_by_role("button", name="Download JSON").count() == 0  # out of sight, out of reach
    settings.tap()
    assert settings.get_attribute("aria-expanded") == "true"
    page.get_by_role("button", name="Download JSON").wait_for()
    assert page.evaluate(wide) <= 390
    page.keyboard.press("Escape")
    assert settings.get_attribute("aria-expanded") == "false"


CONTRAST = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const over = colours => {
        canvas.clearRect(0, 0, 1, 1);
        for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    return WHERE.map(where => {
        const grounds = [], element = document.querySelector(where), style = getComputedStyle(element);
        for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
        const [a, b] = [light(over(grounds)), light(over([...grounds, style.color]))];
        return [where, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
    });
}"""
WORDS = [
    *(f".legend .t{i}" for i in range(5)), ".legend small", ".words", ".words strong", ".ask .t", ".plot figcaption",
    ".plot .ticks span", ".tools button", ".bar .model", "#sd-send", "#sd-recommended", "#sd-sure .info-text",
    "#sd-card dt", "#sd-card li small", "#sd-card .sub",
]  # fmt: skip


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_words_stand_out_from_their_ground_in_light_and_dark(page):
    """Contrast of at least 4.5 (WCAG 2, level AA)."""
    turn = ask(page, "Where is Valencia?")
    turn.locator(".say .t").last.hover()
    for _ in range(2):  # as the system has it, and the other way round
        ratios = page.evaluate(CONTRAST.replace("WHERE", json.dumps(WORDS)))
        assert len({round(ratio, 3) for _, ratio in ratios}) > 5  # the colours were understood
        assert {where: round(ratio, 2) for where, ratio in ratios if ratio < 4.5} == {}
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Dark or light").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        turn.locator(".say .t").last.hover()


def test_a_script_in_a_question_stays_text(page):
    turn = ask(page, EVIL)
    assert text_of(turn.locator(".ask")) == EVIL
    assert page.title() == "selfdoubt: pocket"
    assert page.locator("#sd-turns img, #sd-turns script, #sd-turns strong:not(.words strong)").count() == 0


def test_the_conversation_comes_as_json(page, tmp_path):
    ask(page, "Where is Valencia?")
    ask(page, "What is the capital of France?", 2)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download JSON").click()
    waiting.value.save_as(tmp_path / "it.json")
    found = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))
    assert (found["model"], found["program"]) == ("pocket", "selfdoubt")
    assert [t["question"] for t in found["turns"]] == ["Where is Valencia?", "What is the capital of France?"]
    answer = found["turns"][0]["answers"][0]
    assert answer["text"] == "".join(t["text"] for t in answer["tokens"]) == "The city of Valencia is in Venezuela."
    assert 0.8 < answer["p_correct"] < 0.88
    assert len(answer["tokens"][0]["alternatives"]) == 5
    assert page.locator(".turn").count() == 2


def test_copy_gives_plain_text(page, url):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    turn = ask(page, "What is the capital of France?")
    turn.get_by_role("button", name="Copy").click()
    turn.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "The capital of France is Paris."


def test_what_goes_wrong_is_one_line_and_the_question_stays(page):
    question = "why " * 600
    type_and_ask(page, question)
    page.locator(".notice:not(:empty)").wait_for()
    assert "\n" not in page.locator(".notice").inner_text()
    assert "token" in page.locator(".notice").inner_text()
    assert box(page).input_value().strip() == question.strip()
    assert page.locator(".turn").count() == 0
    turn = ask(page, "What is the capital of France?")
    assert "Paris" in turn.inner_text()
    assert page.locator(".notice").inner_text() == ""


def test_a_new_chat_is_empty_and_the_examples_are_back(page):
    ask(page, "What is the capital of France?")
    page.get_by_role("button", name="New chat").click()
    page.locator(".example").first.wait_for()
    assert page.locator(".turn").count() == 0
    page.locator(".example", has_text="Zorbelheim").click()
    assert "Germany" in text_of(ended(page).locator(".say"))


@pytest.mark.slow  # a server of its own
@pytest.mark.parametrize(
    ("is_prepared", "start", "way"),
    [
        (False, "Note: nothing was trained for the risk of this model", "run selfdoubt prepare --model X --out A"),
        (True, "Note: percentiles are relative to 6 answers of this model", "selfdoubt evaluate --adapter A --data"),
    ],
)
def test_the_page_says_that_a_risk_is_not_calibrated_and_how_to_calibrate_it(
    browser, tmp_path, is_prepared, start, way
):
    """The note stands in a template of JavaScript, where its backticks would end everything."""
    which = ["--model", str(pocket.folder())]
    if is_prepared:
        config = PreparationConfig(max_tokens=8)
        which = ["--adapter", str(prepare(pocket.folder(), tmp_path / "A", config=config, limit=6).folder)]
    command = [sys.executable, "-m", "selfdoubt", "chat", "--port", "0", "--no-open", *which]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        context = browser.new_context(**WINDOW)
        try:
            opened = context.new_page()
            visit(opened, server.stdout.readline().split()[2])
            note = opened.locator(".welcome .note").inner_text()
            assert note.startswith(start)
            assert way in note
            assert "not calibrated" in note
            assert f"selfdoubt: note: {note.removeprefix('Note: ').rstrip('.')}" == (
                server.stderr.readline().rstrip().replace("`", "")
            )
            type_and_ask(opened, "What is the capital of France?")
            shown = ended(opened).inner_text()
            assert "Paris" in shown
            assert ("of the reference answers" in shown) == is_prepared
        finally:
            context.close()
            server.terminate()
            assert server.wait(30) == 0
