"""Notes for users about a model whose risk was not trained."""

from __future__ import annotations

from selfdoubt.members import Spec
from selfdoubt.storage import to_json

#: For a model without an adapter of ours: plain, or with LoRA of plain PEFT.
PLAIN_NOTE = (
    "nothing was trained for the risk of this model, so it is the model's own surprisal and entropy: `selfdoubt train` "
    "adds voters that disagree where it knows little, `selfdoubt evaluate` and `calibrate` a probability of being "
    "right; use the result with --adapter"
)


def explain_untrained(spec: Spec) -> str:
    """Return a one-line warning about an untrained wrapper; its numbers are from ``experiments/LOG.md``."""
    method = to_json(spec)["method"]
    if method == "sculpt":
        return "this sculpt is untrained: its scale says nothing yet; train it with `selfdoubt train`"
    if method == "density":
        return "this density has no statistics yet, so it says nothing; fit it with selfdoubt.lm.density.fit_density"
    return (
        f"this {method} is untrained, and its members make a pretrained model's answers worse (measured: 12.2 % right "
        "falls to 3.9 % with three voters, to 6.0 % with five samples); train it with `selfdoubt train`, or leave the "
        "wrapper out"
    )
