"""Draws the conclusion of a report, in sentences: is low risk right more often, and does it beat the baseline?"""

from __future__ import annotations

from collections.abc import Mapping

from selfdoubt.formatting import format_percent
from selfdoubt.metrics import Estimate
from selfdoubt.report.results import Abstention, Conclusion, Finding, Measurements, NoAbstention, ScoreResults

LABELS = {
    "p_correct": "calibrated p_correct",
    "p_answerable": "calibrated p_answerable, from the question alone",
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
    "cocoa_sum_nll": "CoCoA, of sequence probability",
    "cocoa_mean_nll": "CoCoA, of perplexity",
    "cocoa_mean_total": "CoCoA, of mean token entropy",
    "rauq": "RAUQ",
    "mean_margin": "mean margin",
    "mean_self_certainty": "self-certainty",
    "mean_layer_disagreement": "late layers' disagreement",
    "mean_density": "mean density",
    "choice_nll": "probability of the choice",
    "choice_entropy": "entropy of the choices",
}


def label_score(score: str) -> str:
    """Return a score's usual name, followed by its name here."""
    label = LABELS.get(score, score)
    return label if score in label else f"{label} ({score})"


def find_common_scores(scores: Mapping[str, ScoreResults]) -> list[str]:
    """Return the scores that nearly all judged answers have: at least 95 % of the most that any score has."""
    most = max((s.judged for s in scores.values()), default=0)
    return [name for name, s in scores.items() if s.judged >= 0.95 * most]


def find_best_score(scores: Mapping[str, ScoreResults]) -> str | None:
    """Return the score with the highest PRR among those that nearly all answers have; None where none is defined."""
    prr = {name: scores[name].metrics["prr"].value for name in find_common_scores(scores)}
    known = {name: value for name, value in prr.items() if value is not None}
    return max(known, key=lambda name: known[name], default=None)


def conclude(report: Measurements) -> Conclusion:
    """Return the conclusion of a report's numbers.

    The calibrated ``p_correct``, where there is one, was chosen before; its difference to the baseline is tested on all
    answers. Else the best score is picked on one half of the answers and tested on the other.

    Returns:
        ``low_risk_is_right``: "yes" if the score's AUROC has its interval above 0.5, "no" if below, else "open".
        ``beats_baseline``: the same of its PRR less the baseline's, around 0; None without a comparison.
    """
    best = find_best_score(report.scores)
    remarks = [*_describe_guarantee(report.abstention), *_describe_worth(report), *_warn(report)]
    if best is None:
        cannot = f"The claim cannot be checked on these answers: {_explain_undefined(report)}."
        return Conclusion(None, None, "open", None, (cannot, *remarks))
    calibrated = "p_correct" in report.scores and report.scores["p_correct"].metrics["prr"].value is not None
    score = "p_correct" if calibrated else best
    right = _find_side(report.scores[score].metrics["auroc"], 0.5)
    beats, comparison = _compare_with_baseline(report, score, best)
    sentences = [_describe_tenths(report, score, right), comparison, *_list_numbers(report, score, best), *remarks]
    counts = report.counts
    if counts.unjudged:
        sentences.append(f"{counts.unjudged} of {counts.asked} answers are unjudged and not counted.")
    return Conclusion(score, best, right, beats, tuple(sentences))


#: Judges that count words in common with references, and ignore meaning.
WEAK = {"rouge": "ROUGE", "bleu": "BLEU"}


def describe_promise(abstention: Abstention) -> str | None:
    """Return the guarantee of the answers above the calibration's threshold, in words; None without a guarantee."""
    promise = abstention.promise
    if not promise or "target_accuracy" not in promise:
        return None
    sure = f", with confidence {format_percent(promise['confidence'])}" if "confidence" in promise else ""
    return f"at least {format_percent(promise['target_accuracy'])} right{sure}, on questions like those it was set with"


def _describe_guarantee(abstention: Abstention | NoAbstention) -> list[str]:
    """Return a sentence on the answers above the threshold and the calibration's guarantee for them."""
    if not isinstance(abstention, Abstention):
        return []
    promise = describe_promise(abstention)
    if promise is None:
        return []
    at = "" if abstention.threshold is None else f" of p_correct >= {abstention.threshold:.3f}"
    accuracy = abstention.accuracy
    right = "none is judged" if accuracy.value is None else f"{format_percent(accuracy.value)} of these are right"
    return [
        f"The threshold{at} answers {abstention.answered} of {abstention.decided} questions; {right}. "
        f"It promises {promise}."
    ]


def _describe_worth(report: Measurements) -> list[str]:
    """Return sentences on what abstaining is worth: the Omniscience index, and the utility at the highest price."""
    sentences = []
    metrics = report.abstention.metrics if isinstance(report.abstention, Abstention) else None
    if metrics is not None:
        rate = metrics["hallucination_rate"]
        wrong = "" if rate.value is None else f"; hallucination rate {format_estimate(rate)}"
        everything = report.counts.right - report.counts.wrong
        sentences.append(
            f"Omniscience index (right less wrong, abstaining 0): {format_estimate(metrics['omniscience_index'])}, "
            f"answering all {everything / report.counts.judged:+.3f}{wrong}."
        )
    if report.utilities:
        dearest = max(report.utilities, key=lambda entry: entry.price)
        least, share = dearest.price / (1 + dearest.price), format_percent(dearest.rule_coverage)
        sentences.append(
            f"If a wrong answer costs {dearest.price:g} right ones, answering where p_correct is above {least:.3g} "
            f"({share} of the questions) is worth "
            f"{format_estimate(dearest.rule, signed=True)} per question, answering all "
            f"{format_estimate(dearest.answer_all, signed=True)}."
        )
    return sentences


def _warn(report: Measurements) -> list[str]:
    """Return warnings about the numbers: answers that repeat themselves, a judge that counts words."""
    repetition, judge = report.repetition, report.run.judge
    sentences = []
    if repetition.repeating:
        right = f"; {repetition.right} of them are judged right" if repetition.right else ""
        sentences.append(
            f"{repetition.repeating} of {repetition.of} answers ({format_percent(repetition.share)}) repeat "
            f"themselves{right}."
        )
    if judge in WEAK:
        sentences.append(
            f"Judged by {WEAK[judge]}: a weak judge, which rewards words in common with true answers and even answers "
            "that say nothing or loop; check with --judge llm, or read some."
        )
    return sentences


def _explain_undefined(report: Measurements) -> str:
    counts = report.counts
    if counts.judged < 2:
        return f"{counts.judged} of {counts.asked} are judged"
    if not counts.right or not counts.wrong:
        return f"all {counts.judged} judged answers are {'right' if counts.right else 'wrong'}"
    return "no score separates right from wrong answers"


def _find_side(estimate: Estimate, middle: float) -> Finding:
    if estimate.low is None or estimate.high is None or estimate.low <= middle <= estimate.high:
        return "open"
    return "yes" if estimate.low > middle else "no"


def _describe_tenths(report: Measurements, score: str, right: Finding) -> str:
    curve = report.curves[score]
    start = {
        "yes": "Low risk means right more often",
        "no": "Low risk does not mean right: it is the other way round",
        "open": "These answers do not show that low risk means right",
    }[right]
    return (
        f"{start}: of the surest tenth {format_percent(curve.accuracy[90])} are right, of all "
        f"{format_percent(report.accuracy.value)}, of the riskiest tenth {format_percent(curve.riskiest_tenth)}."
    )


def _list_numbers(report: Measurements, score: str, best: str) -> list[str]:
    def describe(name: str) -> str:
        metrics = report.scores[name].metrics
        return f"{label_score(name)}: PRR {format_estimate(metrics['prr'])}, AUROC {format_estimate(metrics['auroc'])}"

    several = len(report.scores)
    if several == 1:
        return [f"The only score is {describe(score)}."]
    first = [] if score == best else [f"These are the numbers of {describe(score)}."]
    return [*first, f"The best of {several} scores on these answers is {describe(best)}."]


def _compare_with_baseline(report: Measurements, score: str, best: str) -> tuple[Finding | None, str]:
    """Compare the score with the baseline; return the finding, and the same in words."""
    baseline, test = report.baseline, report.best_score_test
    theirs = f"the model's own sequence probability ({baseline})"
    which = label_score(score)
    difference = report.scores[score].against.get("prr")
    if score != "p_correct":
        if best == baseline:
            return "no", f"No other score ranks these answers better than {theirs} does."
        difference = test.prr
        which = f"picked on one half of the answers, {label_score(test.score or best)}"
        theirs += f" on the {test.judged} of the other half"
        if test.score == baseline:
            return "open", f"That any score beats {theirs} is not shown: picked on one half, it is itself the best."
    if difference is None or difference.value is None:
        return None, f"No score can be compared with the model's own sequence probability ({baseline})."
    beats = _find_side(difference, 0)
    by = f"the difference in PRR is {format_estimate(difference, signed=True)}"
    words = {
        "yes": f"{which} beats {theirs}: {by}, an interval above zero.",
        "no": f"{which} does worse than {theirs}: {by}.",
        "open": f"{which} is not shown to beat {theirs}: {by}, an interval with zero in it.",
    }
    return beats, words[beats][0].upper() + words[beats][1:]


def format_estimate(estimate: Estimate, *, signed: bool = False) -> str:
    """Return a number with its interval.

    Example:
        >>> format_estimate(Estimate(0.5, 0.25, 0.75)), format_estimate(Estimate(0.5, -0.1, 0.75), signed=True)
        ('0.500 [0.250, 0.750]', '+0.500 [-0.100, +0.750]')
    """
    if estimate.value is None:
        return "undefined"
    form = "+.3f" if signed else ".3f"
    known = estimate.low is not None and estimate.high is not None
    ends = f" [{estimate.low:{form}}, {estimate.high:{form}}]" if known else ""
    return f"{estimate.value:{form}}{ends}"
