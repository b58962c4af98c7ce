"""The runs whose results are golden: each function returns JSON by the name of the golden file that holds it.

Each runs in an empty folder with the files of ``inputs`` in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.golden import gold
from tests.golden.run import Done, selfdoubt, unpack_written

Golden = dict[str, Any]
KNOWN, RARE, INVENTED = "What is the capital of France?", "In which country is Tartu?", "In which country is Qarzovia?"
FIXED = ("--dtype", "float32")


def ask() -> Golden:
    """Answers of the pocket model with its voters, and of the model alone."""
    greedy = ("--temperature", "0", *FIXED)
    return {
        "ask": selfdoubt("ask", KNOWN, "--json", *greedy).json(),
        "ask_plain_model": selfdoubt("ask", KNOWN, "--json", "--wrapper", "none", *greedy).json(),
        "ask_several": selfdoubt(
            "ask", RARE, INVENTED, "--json", "--show-withheld", "--max-tokens", "5", *greedy
        ).json(),
        "ask_text": selfdoubt("ask", KNOWN, INVENTED, *greedy).text(),
        "ask_raw": selfdoubt("ask", "The capital of", "--raw", "--json", "--max-tokens", "4", *greedy).json(),
    }


def ask_untrained() -> Golden:
    """Answers under untrained wrappers of each kind: their random numbers are those of the seed."""
    options = ("--json", "--temperature", "0", "--max-tokens", "3", *FIXED)
    wrappers = ("vote:n_voters=2,rank=4", "sample:n_samples=2", "sculpt")
    return {f"ask_{w.partition(':')[0]}": selfdoubt("ask", KNOWN, "--wrapper", w, *options).json() for w in wrappers}


def score() -> Golden:
    """Scores of texts and of a file of answers."""
    Path("text.txt").write_text("The capital of France is Lima.", encoding="utf-8")
    rows = [{"question": KNOWN, "answer": "The capital of France is Paris.", "system": "other"},
            {"question": RARE, "answer": "Tartu is in Latvia."}, {"question": KNOWN, "answer": ""}]  # fmt: skip
    Path("given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = selfdoubt("score", "given.jsonl", "--out", "scored.jsonl", *FIXED)
    return {
        "score": selfdoubt("score", "text.txt", "--question", KNOWN, "--json", *FIXED).json(),
        "score_alone": selfdoubt("score", "text.txt", "--wrapper", "none", "--json", *FIXED).json(),
        "score_text": selfdoubt("score", "text.txt", "--question", KNOWN, *FIXED).text(),
        **command("score_file", whole, {"rows": _rows(Path("scored.jsonl")),
                                        "bytes": gold.file_hash(Path("scored.jsonl"))}),
    }  # fmt: skip


def evaluate() -> Golden:
    """A run with samples and hidden states: all files of its folder."""
    done = selfdoubt("evaluate", "--data", "questions.jsonl", "--out", "run", "--samples", "2", "--p-true",
                     "--batch-size", "8", "--limit", "8", "--draws", "20", *FIXED)  # fmt: skip
    return {
        "evaluate_done": {"code": done.code, "err": done.err, "lines": len(done.out.splitlines())},
        **{f"evaluate_{name}": value for name, value in run_folder(Path("run")).items()},
    }


def evaluate_choices() -> Golden:
    """A run over multiple-choice questions."""
    done = selfdoubt("evaluate", "--data", "choices.jsonl", "--out", "run", "--show-choices", "--draws", "10",
                     "--wrapper", "none", "--states", "none", *FIXED)  # fmt: skip
    return {
        "choices": {
            "code": done.code,
            "err": done.err,
            "files": gold.names(Path("run")),
            "answers": _rows(Path("run/answers.jsonl")),
            "run": _json(Path("run/run.json")),
        }
    }


def resume() -> Golden:
    """A run that an earlier version was cut off in goes on: its batches are read, and nothing is asked again."""
    unpack_written()
    run = Path("written/run")
    for left in ("answers.jsonl", "report.json", "report.html", "run.json"):
        (run / left).unlink()
    parts = {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()}
    done = selfdoubt("evaluate", "--data", "questions.jsonl", "--out", str(run), "--draws", "10", "--wrapper", "none",
                     "--states", "none", *FIXED)  # fmt: skip
    return {
        "resume": {
            "code": done.code,
            "err": done.err,
            "files": gold.names(run),
            "answers": _rows(run / "answers.jsonl")[:2],
            "bytes": gold.file_hash(run / "answers.jsonl"),
            "same parts": {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()} == parts,
            "run": _json(run / "run.json"),
        }
    }


def run_folder(run: Path) -> Golden:
    """Return the files of a run; of the report only its structure.

    Which of two scores is better on a few answers may turn on a last digit, and so would the sentences about it:
    the numbers of a report are held where its answers are given (``report``).
    """
    parts = sorted((run / "parts").glob("*.json*"))
    return {
        "files": gold.names(run),
        "answers": {"rows": _rows(run / "answers.jsonl"),
                    "bytes": gold.file_hash(run / "answers.jsonl")},
        "run": _json(run / "run.json"),
        "parts": {p.name: _json(p) if p.suffix == ".json" else gold.shape_of(_rows(p)) for p in parts},
        "states": gold.tensors(run / "states.safetensors"),
        "report_shape": gold.shape_of(_json(run / "report.json")),
        "page_elements": sorted(gold.page((run / "report.html").read_text(encoding="utf-8"))["elements"]),
    }  # fmt: skip


def _rows(path: Path) -> list[Any]:
    return gold.lines(path.read_text(encoding="utf-8"))


def _report(path: Path) -> Any:
    """Return a report, of all but three of its scores only their numbers."""
    report = json.loads(path.read_text(encoding="utf-8"))
    kept = set(list(report["scores"])[:3])
    shape = gold.shape_of(gold.normalise(report["scores"]))
    for name in report["scores"].keys() - kept:
        report["scores"][name] = gold.numbers_in(report["scores"][name])
    report["scores"] = {"~shape": shape, **report["scores"]}
    return gold.normalise(report)


def _json(path: Path) -> Any:
    return gold.normalise(json.loads(path.read_text(encoding="utf-8")))


def report() -> Golden:
    """Reports on another system's answers and on a run that was written earlier; both runs compared."""
    unpack_written()
    theirs = selfdoubt("report", "theirs.jsonl", "--out", "theirs", "--draws", "20", "--judge", "exact")
    again = selfdoubt("report", "written/run", "--out", "again", "--draws", "20")
    compared = ("compare", "written/run", "written/other", "--draws", "20")
    return {
        **command("report_theirs", theirs, {"files": gold.names(Path("theirs")),
                                            "report": _report(Path("theirs/report.json"))}),
        "report_theirs_page": gold.page(Path("theirs/report.html").read_text(encoding="utf-8")),
        **command("report_written", again, {"files": gold.names(Path("again")),
                                            "report": _report(Path("again/report.json"))}),
        "compare": selfdoubt(*compared, "--json").json(),
        "compare_text": selfdoubt(*compared).text(),
    }  # fmt: skip


def calibrate() -> Golden:
    """A calibration learnt from a run that was written earlier; answers with it, and with the one written earlier."""
    unpack_written()
    done = selfdoubt("calibrate", "written/run", "--out", "calibrated", "--draws", "20", "--target-accuracy", "0.5",
                     "--heads", "score,answer,question")  # fmt: skip
    answers = [
        selfdoubt("ask", INVENTED, "--adapter", a, "--json", "--max-tokens", "4", "--temperature", "0", *FIXED).json()
        for a in ("calibrated", "written/calibrated")
    ]
    return {
        **command("calibrate", done, adapter(Path("calibrated"))),
        "calibrate_run_after": {"files": gold.names(Path("written/run")),
                                "answers": _rows(Path("written/run/answers.jsonl"))[:2],
                                "bytes": gold.file_hash(Path("written/run/answers.jsonl"))},
        "ask_calibrated": answers[0],
        "ask_written_calibrated": answers[1],
    }  # fmt: skip


def adapter(folder: Path) -> Golden:
    """Return all files of an adapter folder or of a model's, but checkpoints, prepared data, and words for people."""
    found: Golden = {"files": gold.names(folder)}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = gold.tensors(path)
        elif path.name == "selfdoubt.json":
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if "reference" in manifest:
                quantiles = manifest["reference"]
                manifest["reference"] = {"~keys": " ".join(quantiles), "values": gold.numbers_in(quantiles)}
            found[name] = gold.normalise(manifest)
        elif path.suffix == ".json" and path.name != "tokenizer.json" and path.parent.name != "data":
            found[name] = _json(path)
        elif path.suffix == ".toml":
            found[name] = gold.text(path.read_text(encoding="utf-8"))
        elif path.suffix in (".jinja", ".json"):
            found[name] = gold.file_hash(path) if path.parent.name != "data" else "~"
    return found


def command(name: str, done: Done, value: Golden) -> Golden:
    """Return what a command left, and apart from it its words for people."""
    return {name: value, f"{name}_text": done.text()}


CASES = (ask, ask_untrained, score, evaluate, evaluate_choices, resume, report, calibrate)
