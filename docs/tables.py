"""Writes the tables of ``docs/scores.md`` and ``docs/speed.md``: ``python docs/tables.py``.

A test compares them with the code and the results. Formulas and sources are written here; the worth of a score is read
from ``benchmarks/results``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from selfdoubt.lm.scores import ANSWER_SCORES, Score

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"

#: Of each signal: formula for the distribution p that answers, source, range, needs.
SIGNALS: dict[str, tuple[str, str, str, str]] = {
    "nll": (
        "surprisal, -log p(token)",
        "Shannon, 1948",
        "nats, ≥ 0",
        "",
    ),
    "total": (
        "entropy of p",
        "Shannon, 1948",
        "nats, [0, log vocabulary]",
        "",
    ),
    "aleatoric": (
        "mean entropy of the members",
        "Houlsby et al., 2011",
        "nats, as `total`",
        "members",
    ),
    "epistemic": (
        "entropy of the members' mean - `aleatoric`: mutual information",
        "Houlsby et al., 2011",
        "nats, [0, log members]",
        "members",
    ),
    "disagreement": (
        "share of members whose most probable token is another",
        "variation ratio, Freeman, 1965",
        "[0, 1]",
        "members",
    ),
    "spread": (
        "standard deviation of the token's probability over members",
        "",
        "[0, 0.5]",
        "members",
    ),
    "scale": (
        "predicted standard deviation of the token's logit",
        "Kendall & Gal, 2017",
        "≥ 0",
        "a sculpt",
    ),
    "divergence": (
        "mean KL(base ‖ member)",
        "Kullback & Leibler, 1951",
        "nats, ≥ 0",
        "a base that answers for members",
    ),
    "margin": (
        "1 - (largest - second largest probability)",
        "Scheffer et al., 2001",
        "[0, 1]",
        "a token of an answer",
    ),
    "self_certainty": (
        "-KL(uniform ‖ p)",
        "Kang et al., 2025",
        "nats, ≤ 0",
        "a token of an answer",
    ),
    "layer_disagreement": (
        "mean Jensen-Shannon divergence of p and what the norm and head make of three late layers' states, "
        "over the 32 most probable tokens",
        "after DoLa, Chuang et al., 2024",
        "nats, [0, log 2]",
        "a token of an answer; a plain head",
    ),
    "density": (
        "Mahalanobis distance of the features that enter the head from those of usual tokens",
        "Lee et al., 2018",
        "≥ 0; relative to a background: any",
        "a fitted density",
    ),
    "relative_density": (
        "distance of these features from those of the model's answers - `density`",
        "Ren et al., 2023",
        "any",
        "a fitted density",
    ),
}
#: Of each score with a name of its own: formula, source, range, needs.
SCORES: dict[str, tuple[str, str, str, str]] = {
    "rauq": (
        "c₁ = p₁, cᵢ = 0.2 pᵢ + 0.8 aᵢ cᵢ₋₁, with aᵢ the attention of the position that predicts token i on "
        "itself; the largest over the middle third of the layers of mean(-log cᵢ)",
        "Vazhentsev et al., 2025",
        "nats, ≥ 0",
        "`sdpa` or `eager` attention",
    ),
    "rank_joint": (
        "mean rank of `mean_nll` and `question_sum_nll`: *am I sure of each token, and is the question long "
        "and strange?* The default risk of a prepared model",
        "this library",
        "[0, 1]",
        "reference answers",
    ),
    "rank_nll": (
        "2/3 rank of `sum_nll` + 1/3 rank of `question_mean_nll`: *am I sure of my answer, and have I met "
        "this subject before?* The pocket model's default",
        "this library",
        "[0, 1]",
        "reference answers",
    ),
    "rank_nll_total": (
        "mean rank of `sum_nll` and `mean_total`",
        "this library",
        "[0, 1]",
        "reference answers",
    ),
    "rank_nll_rauq": (
        "mean rank of `sum_nll` and `rauq`",
        "this library",
        "[0, 1]",
        "reference answers, attention",
    ),
    "rank_density": (
        "2/3 rank of `sum_nll` + 1/3 rank of `mean_relative_density`",
        "this library",
        "[0, 1]",
        "reference answers, a fitted density",
    ),
    "p_false": (
        '1 - probability of "True" when the model is asked if its answer is true',
        "Kadavath et al., 2022",
        "[0, 1]",
        "`--p-true`: one pass more",
    ),
    "self_consistency": (
        "share of drawn answers that do not mean the same as the answer",
        "after Wang et al., 2023",
        "[0, 1]",
        "`--candidates N`: N answers more",
    ),
    "semantic_entropy": (
        "entropy of the drawn answers' meanings",
        "Farquhar et al., 2024",
        "nats, [0, log N]",
        "`--candidates N`",
    ),
    "semantic_entropy_weighted": (
        "the same, weighted by probability",
        "Kuhn et al., 2023",
        "nats, [0, log N]",
        "`--candidates N`",
    ),
    "n_clusters": (
        "number of meanings",
        "Kuhn et al., 2023",
        "[1, N]",
        "`--candidates N`",
    ),
    "lexical_dissimilarity": (
        "1 - mean ROUGE-L over pairs of drawn answers",
        "Fomicheva et al., 2020",
        "[0, 1]",
        "`--candidates N`",
    ),
    "cocoa_sum_nll": (
        "CoCoA: `sum_nll` times the mean dissimilarity of the drawn answers to the answer",
        "Vashurin et al., 2025",
        "nats, ≥ 0",
        "`--candidates N`",
    ),
    "cocoa_mean_nll": (
        "the same with `mean_nll`",
        "Vashurin et al., 2025",
        "nats, ≥ 0",
        "`--candidates N`",
    ),
    "cocoa_mean_total": (
        "the same with `mean_total`",
        "Vashurin et al., 2025",
        "nats, ≥ 0",
        "`--candidates N`",
    ),
}

MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen", "gemma": "Gemma"}
#: Sets whose answers are free text; the others ask for a choice.
SETS = {"webquestions": "WebQuestions", "nq": "NQ-open", "squad2": "SQuAD 2", "truthfulqa": "TruthfulQA"}
BASELINE = "sum_nll"
#: Models of the benchmark of decoding, and its arms.
SIZES = {"pocket": "pocket, 4.7M", "135m": "135M shape", "1b": "1B shape"}
ARMS = {
    "plain": "no wrapper, entropies and surprisals",
    "free": "no wrapper, all free scores",
    "vote3": "`vote`, three voters of rank 16",
    "vote3-late": "`vote`, three voters in the last quarter of the layers",
    "vote3-answer": '`vote`, three voters, `start="answer"`',
    "sample5": "`sample`, five samples",
    "sculpt": "`sculpt`",
    "separate3": "three separate passes, the naive way",
}

#: PRR of a score by (model, set).
Cells = dict[tuple[str, str], float]


def read_worth() -> dict[str, tuple[Cells, Cells, str]]:
    """Return the PRR of each measured score, that of the baseline on the same answers, and what was asked."""
    rows = json.loads((RESULTS / "real-cpu.json").read_text(encoding="utf-8"))["rows"]
    cells: dict[tuple[str, str], Cells] = {}
    for row in rows:
        if row["metric"] == "prr" and row.get("score") and "domain" not in row and row["set"] in SETS:
            cells.setdefault((row["score"], row["arm"]), {})[row["model"], row["set"]] = row["value"]
    worth: dict[str, tuple[Cells, Cells, str]] = {}
    for arm, note in (("plain", "as they are"), ("prepared", "prepared"), ("peers", "ten drawn answers each")):
        for (score, answered), values in cells.items():
            if answered == arm and score not in worth:
                baseline = cells[BASELINE, arm]
                worth[score] = (values, {cell: baseline[cell] for cell in values}, note)
    trained: dict[str, Cells] = {}
    for row in json.loads((RESULTS / "voters-cpu.json").read_text(encoding="utf-8"))["rows"]:
        if (row.get("metric"), row["kind"], row["arm"], row["judge"]) == ("prr", "label-free", "vote", "contains"):
            trained.setdefault(row["score"], {})["smollm2", row["tested on"]] = row["value"]
    for score, values in trained.items():
        if score not in worth:
            worth[score] = (values, {cell: trained[BASELINE][cell] for cell in values}, "three trained voters")
    for row in rows:
        if row.get("metric") == "prr" and "domain" in row:
            note = "calibrated on the same set" if row["domain"] == "in domain" else "calibrated on the other sets"
            values, _, _ = worth.setdefault(f"p_correct, {row['domain']}", ({}, {}, note))
            values[row["model"], row["set"]] = row["value"]
    for score, (values, baseline, _) in worth.items():
        if score.startswith("p_correct"):
            baseline |= {cell: cells[BASELINE, "plain"][cell] for cell in values}
    return worth


def list_measured(names: Iterable[str], worth: Mapping[str, tuple[Cells, Cells, str]]) -> str:
    """Return the mean PRR of some scores as text, with that of the baseline on the same answers."""
    entries = [
        f"`{name}` {fmean(worth[name][0].values()):.2f} ({fmean(worth[name][1].values()):.2f}, {len(worth[name][0])})"
        for name in names
        if name in worth
    ]
    return "<br>".join(entries) or "not measured on these"


def write_rows(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Return a table in Markdown whose first columns are set left, the others right."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def write_signals() -> str:
    """Return the table of signals."""
    worth = read_worth()
    names = [name for name, score in ANSWER_SCORES.items() if isinstance(score, Score)]
    rows = []
    for signal, about in SIGNALS.items():
        scores = sorted(name for name in names if ANSWER_SCORES[name].signal == signal)
        rows.append([f"`{signal}`", *about, list_measured(scores, worth)])
    return write_rows(["signal", "formula", "source", "range", "needs", "worth, mean PRR"], rows, 6)


def write_scores() -> str:
    """Return the table of scores that are not a pool of one signal."""
    worth = read_worth()
    rows = [[f"`{name}`", *about, list_measured([name], worth)] for name, about in SCORES.items()]
    return write_rows(["score", "formula", "source", "range", "needs", "worth, mean PRR"], rows, 6)


def write_worth() -> str:
    """Return the PRR of each score on each model and set, in the order of their means."""
    worth = read_worth()
    cells = [(model, name) for model in MODELS for name in SETS if (model, name) in worth[BASELINE][0]]
    ordered = sorted(worth, key=lambda s: (-len(worth[s][0]), worth[s][2], -fmean(worth[s][0].values())))
    rows = []
    for score in ordered:
        values, baseline, note = worth[score]
        single = [f"{values[cell]:.2f}" if cell in values else "" for cell in cells]
        means = [f"{fmean(values.values()):.2f}", f"{fmean(baseline.values()):.2f}"]
        rows.append([f"`{score.partition(',')[0]}`", note, *means, *single])
    names = [f"{MODELS[model]} {SETS[name]}" for model, name in cells]
    return write_rows(["score", "models", "mean", f"`{BASELINE}`, same answers", *names], rows, 2)


def write_cost() -> str:
    """Return the time per token of each wrapper, to plain ``generate`` and to the faster of its two forms."""
    rows = json.loads((RESULTS / "decode-cpu.json").read_text(encoding="utf-8"))["rows"]
    ratios = {(row["model"], row["arm"]): (row["ratio"], row["ratio_to_best"]) for row in rows}
    table = []
    for arm, name in ARMS.items():
        cells = [ratios[model, arm] for model in SIZES]
        table.append([name, *(f"{plain:.2f}x ({best:.2f}x)" for plain, best in cells)])
    return write_rows(["", *SIZES.values()], table, 1)


#: Tables by page and name.
TABLES = {
    "scores.md": {"signals": write_signals, "scores": write_scores, "worth": write_worth},
    "speed.md": {"cost": write_cost},
}


def update(page: str, text: str) -> str:
    """Return a page with its tables written again, between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    for name, write in TABLES[page].items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} must have the marks of the table {name!r} exactly once")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{write()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        path = DOCS / page
        path.write_text(update(page, path.read_text(encoding="utf-8")), encoding="utf-8")
