"""Whether the claim holds: answers with low risk are right more often, and risk says so better than the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

#: "open": the interval does not decide.
Held = Literal["yes", "no", "open"]

LABELS = {
    "p_correct": "calibrated p_correct",
    "sum_nll": "sequence probability",
    "mean_nll": "perplexity",
    "max_nll": "least probable token",
    "mean_total": "mean token entropy",
    "max_total": "greatest token entropy",
    "sum_total": "sum of token entropies",
    "question_mean_nll": "surprisal of the question",
    "p_false": "P(True)",
    "self_consistency": "self-consistency",
    "semantic_entropy": "semantic entropy",
    "semantic_entropy_weighted": "semantic entropy, weighted",
    "n_clusters": "number of meanings",
    "lexical_dissimilarity": "lexical similarity",
    "choice_nll": "probability of the choice",
    "choice_entropy": "entropy of the choices",
}


def label(score: str) -> str:
    """What people call a score, with its name."""
    own = LABELS.get(score, score)
    return own if score in own else f"{own} ({score})"


def common(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores that nearly all judged answers have: at least 95 % of the most that any score has."""
    most = max((s["judged"] for s in scores.values()), default=0)
    return [name for name, s in scores.items() if s["judged"] >= 0.95 * most]


def best_of(scores: Mapping[str, Any]) -> str | None:
    """The name with the highest PRR among the scores that nearly all answers have; None where none is defined."""
    found = {name: scores[name]["metrics"]["prr"]["value"] for name in common(scores)}
    known = {name: value for name, value in found.items() if value is not None}
    return max(known, key=lambda name: known[name], default=None)


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report's numbers say.

    The calibrated ``p_correct``, where there is one, was chosen before; its difference to the baseline is tested on all
    answers. Else the best score is picked on one half of the answers and tested on the other.

    Args:
        report: As ``measure`` makes it, without its verdict.

    Returns:
        ``score``: the one that the claim is about, or None; ``best``: the one with the highest PRR.
        ``low_risk_is_right``: "yes" if the score's AUROC has its interval above 0.5, "no" if below, else "open".
        ``beats_baseline``: the same of its PRR less the baseline's, around 0; None where there is no comparison.
        ``sentences``: all of it in words.
    """
    scores, counts = report["scores"], report["counts"]
    best = best_of(scores)
    warnings = _warnings(report)
    if best is None:
        cannot = f"The claim cannot be checked on these answers: {_undefined(report)}."
        return {
            "score": None,
            "best": None,
            "low_risk_is_right": "open",
            "beats_baseline": None,
            "sentences": [cannot, *warnings],
        }
    known = "p_correct" in scores and scores["p_correct"]["metrics"]["prr"]["value"] is not None
    score = "p_correct" if known else best
    right = _side(scores[score]["metrics"]["auroc"], 0.5)
    beats, comparison = _against(report, score, best)
    sentences = [_first(report, score, right), comparison, *_named(report, score, best)]
    sentences += warnings
    if counts["unjudged"]:
        sentences.append(f"{counts['unjudged']} of {counts['asked']} answers are unjudged and not counted.")
    return {
        "score": score,
        "best": best,
        "low_risk_is_right": right,
        "beats_baseline": beats,
        "sentences": sentences,
    }


#: Judges that count words in common with references: they know nothing of meaning.
WEAK = {"rouge": "ROUGE", "bleu": "BLEU"}


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Say what makes these numbers worth less: answers that repeat themselves, and a judge that counts words."""
    found, judge = report["repetition"], report["run"].get("judge")
    sentences = []
    if found["repeating"]:
        right = f"; {found['right']} of them are judged right" if found["right"] else ""
        sentences.append(
            f"{found['repeating']} of {found['of']} answers ({percent(found['share'])}) repeat themselves{right}."
        )
    if judge in WEAK:
        sentences.append(
            f"Judged by {WEAK[judge]}: a weak judge, which rewards words in common with true answers and even answers "
            "that say nothing or loop; check with --judge llm, or read some."
        )
    return sentences


def _undefined(report: Mapping[str, Any]) -> str:
    counts = report["counts"]
    if counts["judged"] < 2:
        return f"{counts['judged']} of {counts['asked']} are judged"
    if not counts["right"] or not counts["wrong"]:
        return f"all {counts['judged']} judged answers are {'right' if counts['right'] else 'wrong'}"
    return "no score tells them apart"


def _side(entry: Mapping[str, Any], middle: float) -> Held:
    if entry["low"] is None or entry["low"] <= middle <= entry["high"]:
        return "open"
    return "yes" if entry["low"] > middle else "no"


def _first(report: Mapping[str, Any], score: str, right: Held) -> str:
    curve = report["curves"][score]
    surest, riskiest = curve["accuracy"][90], curve["riskiest_tenth"]
    everywhere = report["accuracy"]["value"]
    start = {
        "yes": "Low risk means right more often",
        "no": "Low risk does not mean right: it is the other way round",
        "open": "These answers do not show that low risk means right",
    }[right]
    return (
        f"{start}: of the surest tenth {percent(surest)} are right, of all {percent(everywhere)}, "
        f"of the riskiest tenth {percent(riskiest)}."
    )


def _named(report: Mapping[str, Any], score: str, best: str) -> list[str]:
    def numbers(name: str) -> str:
        metrics = report["scores"][name]["metrics"]
        return f"{label(name)}: PRR {interval(metrics['prr'])}, AUROC {interval(metrics['auroc'])}"

    several = len(report["scores"])
    if several == 1:
        return [f"The only score is {numbers(score)}."]
    first = [] if score == best else [f"These are the numbers of {numbers(score)}."]
    return [*first, f"The best of {several} scores on these answers is {numbers(best)}."]


def _against(report: Mapping[str, Any], score: str, best: str) -> tuple[Held | None, str]:
    """How the score compares with the baseline, and the same in words."""
    baseline, found = report["baseline"], report["picked"]
    own = f"the model's own sequence probability ({baseline})"
    which = label(score)
    difference = report["scores"][score]["against"].get("prr")
    if score != "p_correct":
        if best == baseline:
            return "no", f"No other score ranks these answers better than {own} does."
        difference = found.get("prr")
        which = f"picked on one half of the answers, {label(found.get('score', best))}"
        own += f" on the {found.get('judged')} of the other half"
        if found.get("score") == baseline:
            return "open", f"That any score beats {own} is not shown: picked on one half, it is itself the best."
    if difference is None or difference["value"] is None:
        return None, f"No score can be compared with the model's own sequence probability ({baseline})."
    beats = _side(difference, 0)
    by = f"the difference in PRR is {signed(difference)}"
    words = {
        "yes": f"{which} beats {own}: {by}, an interval above zero.",
        "no": f"{which} does worse than {own}: {by}.",
        "open": f"{which} is not shown to beat {own}: {by}, an interval with zero in it.",
    }
    return beats, words[beats][0].upper() + words[beats][1:]


def percent(value: float | None) -> str:
    """A share as people read it; never 100 % or 0 % where it is a little less or more.

    Example:
        >>> percent(0.5), percent(0.9996), percent(1.0)
        ('50 %', '>99.9 %', '100 %')
    """
    if value is None:
        return "unknown"
    text = f"{100 * value:.1f}".removesuffix(".0")
    if text == "100" and value < 1:
        return ">99.9 %"
    return "<0.1 %" if text == "0" and value > 0 else f"{text} %"


def interval(entry: Mapping[str, Any]) -> str:
    """A number with its interval.

    Example:
        >>> interval({"value": 0.5, "low": 0.25, "high": 0.75})
        '0.500 [0.250, 0.750]'
    """
    if entry["value"] is None:
        return "undefined"
    ends = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return f"{entry['value']:.3f}{ends}"


def signed(entry: Mapping[str, Any]) -> str:
    """A difference with its interval, all with their signs."""
    ends = "" if entry["low"] is None else f" [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    return f"{entry['value']:+.3f}{ends}"
