"""What is printed where a chance is not known: why, on a terminal and as JSON."""

from __future__ import annotations

import inspect
import json

import pytest

from selfdoubt.cli.ask import ask
from selfdoubt.cli.chat import chat
from selfdoubt.cli.output import build_printer
from selfdoubt.cli.terminal import summarize_answer
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.sampling import Sampling
from selfdoubt.serve.chat import mount
from selfdoubt.serve.chat.conversation import ChatSettings

TOKEN = Token("Lima", 7, -9.0, 1.0, 1.0, 0.0, 0.0, 0.0, None, 9.0)
NOTE = "the text is far from what the calibration has seen"


def answer(p=None, note=NOTE, abstain=True, finish="given"):
    return Answer("Lima", (TOKEN,), (), {"sum_nll": 9.0}, 9.0, "sum_nll", None, finish, p, abstain, None, note)


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        (answer(), f"; right with probability: not known here ({NOTE})"),
        (answer(0.5, None), "; right with probability 50%, too little to answer"),
        (answer(0.9, NOTE, abstain=False), f"; right with probability 90% ({NOTE})"),
        (answer(None, None, None), "risk 9.000 (sum_nll)"),
    ],
)
def test_a_summary_says_the_chance_or_why_there_is_none(given, ends):
    assert summarize_answer(given).endswith(ends)


@pytest.mark.parametrize("abstained", ["never", "with notice", "always"])
@pytest.mark.parametrize("finish", ["given", "stop"])
def test_both_printers_tell_it(capsys, abstained, finish):
    build_printer(as_json=False, abstained=abstained).whole("Where?", answer(finish=finish))
    assert NOTE in " ".join(capsys.readouterr().out.split())
    build_printer(as_json=True, abstained=abstained).whole("Where?", answer(finish=finish))
    last = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert (last["p_correct"], last["p_correct_note"], last["abstain"]) == (None, NOTE, True)


def test_ask_and_the_page_decode_with_the_defaults_of_the_library():
    settings = ChatSettings()
    defaults = {name: inspect.signature(ask).parameters[name].default for name in ("top_p", "max_tokens")}
    assert defaults == {"top_p": Sampling.top_p, "max_tokens": Sampling.max_tokens}
    assert (settings.temperature, settings.max_tokens) == (Sampling.temperature, Sampling.max_tokens)
    assert inspect.signature(mount).parameters["max_tokens"].default == Sampling.max_tokens
    assert inspect.signature(chat).parameters["max_tokens"].default == Sampling.max_tokens
