"""The command line as its users run it: real processes, real output, real exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfdoubt import pocket

QUESTION = "What is the capital of France?"
TEXT = "The capital of France is Paris."


def run(*arguments: str, stdin: str | bytes = "", **environment: str) -> subprocess.CompletedProcess[str]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        [sys.executable, "-m", "selfdoubt", *arguments],
        input=data,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
        timeout=300,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same command without a new process, for the many cases of bad input."""
    from selfdoubt.cli import main

    monkeypatch.setattr(sys, "argv", ["selfdoubt", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_ask_answers_with_a_number_for_each_token() -> None:
    done = run("ask", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris{" in done.stdout
    assert "riskier than" in done.stdout
    assert "most doubtful token" in done.stdout
    assert "\x1b[" not in done.stdout
    assert done.stderr == ""


def test_ask_colours_tokens_on_a_terminal_unless_told_not_to() -> None:
    coloured = run("ask", QUESTION, FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color")
    assert "\x1b[" in coloured.stdout
    assert "Paris{" not in coloured.stdout
    plain = run("ask", QUESTION, FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm-256color", NO_COLOR="1")
    assert "Paris{" in plain.stdout


def test_ask_compares_several_questions_side_by_side() -> None:
    done = run("ask", QUESTION, "Where is Zorbelheim?")
    assert done.stdout.count("most doubtful token") == 1
    assert done.stdout.count("I'm not sure.") == 2  # in its place, and in the table
    assert "percentile" in done.stdout
    both = run("ask", QUESTION, "Where is Zorbelheim?", "--show-withheld")
    assert both.stdout.count("most doubtful token") == 2


def test_json_is_one_object_a_token_and_then_the_answer() -> None:
    lines = [json.loads(line) for line in run("ask", QUESTION, "--json").stdout.splitlines()]
    tokens = [item for item in lines if item["type"] == "token" and item["part"] == "answer"]
    question = [item for item in lines if item["type"] == "token" and item["part"] == "question"]
    assert "".join(t["text"] for t in tokens) == lines[-1]["text"]
    assert "".join(t["text"] for t in question) == QUESTION
    assert lines[-1]["type"] == "answer"
    assert 0 <= lines[-1]["percentile"] <= 1
    for token in tokens:
        assert token["total"] == pytest.approx(token["aleatoric"] + token["epistemic"], abs=1e-4)
        assert token["alternatives"]


def test_the_same_seed_gives_the_same_answer_and_another_seed_others() -> None:
    def answers(seed: int) -> list[str]:
        done = run("ask", "In which country is Qarzovia?", "--candidates", "6", "--seed", str(seed), "--json")
        return [item["text"] for line in done.stdout.splitlines() if (item := json.loads(line))["type"] == "answer"]

    first = answers(1)
    assert len(first) == 6
    assert first == answers(1)
    assert sorted(first) != sorted(answers(100))


def test_candidates_come_most_confident_first() -> None:
    done = run("ask", "In which country is Qarzovia?", "--candidates", "5", "--json")
    answers = [item for line in done.stdout.splitlines() if (item := json.loads(line))["type"] == "answer"]
    assert len(answers) == 5
    order = []
    for answer in answers:
        p, without = answer["p_correct"], answer["p_correct"] is None and answer["p_correct_note"] is not None
        order.append((without, -(1 - answer["percentile"] if p is None else p), answer["risk"]))
    assert order == sorted(order)


def test_until_percentile_says_whether_it_became_confident() -> None:
    sure = run("ask", QUESTION, "--until-percentile", "0.9", "--json")
    assert sure.returncode == 0
    assert json.loads(sure.stdout.splitlines()[-1]) == {
        "type": "verdict", "confident": True, "tries": 1, "percentile": 0.9,
    }  # fmt: skip
    unsure = run("ask", "Where is Zorbelheim?", "--until-percentile", "0", "--max-tries", "2")
    assert unsure.returncode == 1
    assert "not confident" in unsure.stdout


def test_score_reads_a_file_or_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    from_file = run("score", str(file), "--json")
    from_pipe = run("score", "-", "--json", stdin=TEXT)
    assert from_file.stdout == from_pipe.stdout
    assert json.loads(from_file.stdout.splitlines()[-1])["text"] == TEXT


def test_score_finds_the_wrong_answer_riskier(tmp_path: Path) -> None:
    def nll(text: str) -> float:
        done = run("score", "-", "--question", QUESTION, "--json", stdin=text)
        return float(json.loads(done.stdout.splitlines()[-1])["scores"]["sum_nll"])

    assert nll(TEXT) + 2 < nll("The capital of France is Lima.")


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f'{sys.executable} -m selfdoubt ask "{QUESTION}" | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr


def test_score_marks_the_word_that_is_wrong():
    done = run("score", "-", "--question", QUESTION, "--json", stdin="The capital of France is Lima.")
    tokens = [item for line in done.stdout.splitlines() if (item := json.loads(line)).get("part") == "answer"]
    assert max(tokens, key=lambda token: token["risk"])["text"].strip() == "Lima"


def test_score_promises_nothing_of_a_text_that_the_model_would_not_say():
    done = run("score", "--question", QUESTION, stdin="The capital of France is Lima.")
    assert done.returncode == 0, done.stderr
    assert "right with probability: not known here (the text is not what the model itself would say" in done.stdout
    known = run("score", "--question", QUESTION, "--json", stdin=TEXT)
    answer = json.loads(known.stdout.splitlines()[-1])
    assert answer["p_correct"] > 0.9
    assert answer["p_correct_note"] is None


COMMANDS = ["ask", "calibrate", "chat", "compare", "evaluate", "export", "report", "score", "serve", "train"]


@pytest.mark.parametrize("command", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {command!r}\n"
        "from selfdoubt.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'gradio', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["ask"], "questions"),
        (["ask", ""], "empty"),
        (["ask", "word " * 3000], "at most 512"),
        (["ask", "hi", "--modle", "x"], "--model"),
        (["aks", "hi"], "ask"),
        (["ask", "hi", "--temperature", "hot"], "--temperature"),
        (["ask", "hi", "--temperature", "-1"], "temperature"),
        (["ask", "hi", "--top-p", "0"], "top_p"),
        (["ask", "hi", "--max-tokens", "0"], "max_tokens"),
        (["ask", "hi", "--candidates", "0"], "candidates"),
        (["ask", "hi", "--candidates", "3", "--temperature", "0"], "temperature"),
        (["ask", "hi", "--candidates", "2", "--until-percentile", "0.5"], "--candidates"),
        (["ask", "hi", "--until-percentile", "50"], "between 0 and 1"),
        (["ask", "hi", "--until-percentile", "0.5", "--wrapper", "none"], "reference"),
        (["ask", "hi", "--wrapper", "guess"], "vote"),
        (["ask", "hi", "--wrapper", "vote:n_voters=0"], "n_voters"),
        (["ask", "hi", "--wrapper", "vote:voters=3"], "voters"),
        (["ask", "hi", "--wrapper", "vote:n_voters"], "n_voters=5"),
        (["ask", "hi", "--wrapper", "vote:param_filter=nothing_like_it"], "nearest"),
        (["ask", "hi", "--risk", "courage"], "mean_nll"),
        (["ask", "hi", "--dtype", "int7"], "bfloat16"),
        (["ask", "hi", "--model", "./no/such/folder"], "config.json"),
        (["ask", "hi", "--model", "no-such-name-on-the-hub"], "hub"),
        (["ask", "hi", "--adapter", "./no/such/adapter"], "selfdoubt.json"),
        (["score", "./no/such/file.txt"], "cannot be read"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdoubt: ")
    assert error.count("\n") == 1
    assert wanted in error
    assert "Traceback" not in error


def test_an_unknown_quantisation_gets_one_line() -> None:
    done = run("ask", "hi", "--quantize", "int3")
    assert done.returncode == 2
    assert "nf4" in done.stderr
    assert done.stderr.count("\n") == 1


def test_text_that_is_not_utf8_gets_one_line() -> None:
    done = run("score", "-", stdin=b"\xff\xfe\xfa")
    assert done.returncode == 2
    assert "UTF-8" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_or_foreign_adapter_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pocket.voters_folder(), broken)
    weights = broken / "added.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert in_process(monkeypatch, "ask", "hi", "--adapter", str(broken)) == 2
    assert "added.safetensors was changed after it was saved" in capsys.readouterr().err
    (broken / "selfdoubt.json").write_text("{")
    assert in_process(monkeypatch, "ask", "hi", "--adapter", str(broken)) == 2
    assert "selfdoubt.json is broken" in capsys.readouterr().err
