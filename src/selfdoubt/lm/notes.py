"""Notes for users about a model whose risk was not trained, or is not calibrated."""

from __future__ import annotations

from selfdoubt.spec import Spec
from selfdoubt.storage import to_json

#: The way from percentiles to a probability.
CALIBRATE = (
    "`selfdoubt evaluate --adapter A --data ...` and `selfdoubt calibrate` turn it into a probability of being right"
)
#: For a model without an adapter of ours: plain, or with LoRA of plain PEFT.
PLAIN_NOTE = (
    "nothing was trained for the risk of this model, so it is the model's own surprisal and entropy, not calibrated: "
    "run `selfdoubt prepare --model X --out A` (minutes, no labels) for percentiles, then "
    f"{CALIBRATE}"
)


def explain_uncalibrated(answers: int | None, *, has_reference: bool) -> str:
    """Return a one-line note on an adapter without a calibration.

    Args:
        answers: Number of reference answers; None if the adapter does not say it.
        has_reference: True if there are reference answers.
    """
    if not has_reference:
        return (
            "the risk of this adapter is not calibrated and has no percentile: run `selfdoubt prepare --adapter A "
            f"--out B` (minutes, no labels) for percentiles, then {CALIBRATE}"
        )
    size = "" if answers is None else f"{answers:,} "
    return f"percentiles are relative to {size}answers of this model, and its risk is not calibrated: {CALIBRATE}"


def explain_untrained(spec: Spec) -> str:
    """Return a one-line warning about an untrained wrapper; its numbers are from ``experiments/LOG.md``."""
    method = to_json(spec)["method"]
    if method == "sculpt":
        return "this sculpt is untrained: its scale says nothing yet; train it with `selfdoubt train`"
    if spec.has_base:
        return (
            f"this {method} is untrained: the answers are the base model's own, and its members only say how far "
            "models nearby disagree with them; train it with `selfdoubt train`"
        )
    if method == "density":
        return "this density has no statistics yet, so it says nothing; fit it with selfdoubt.lm.density.fit_density"
    return (
        f"this {method} is untrained, and its members make a pretrained model's answers worse (measured: 12.2 % right "
        "falls to 3.9 % with three voters, to 6.0 % with five samples); train it with `selfdoubt train`, or let "
        "the base model answer (answer_from='base')"
    )
