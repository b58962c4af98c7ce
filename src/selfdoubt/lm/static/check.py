"""Check that a model's static step gives what its steps over a dynamic cache give, on made-up prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from selfdoubt.lm.static.step import StaticStep
from selfdoubt.lm.static.stepper import Buckets, build_allocator
from selfdoubt.lm.stepper import HFStepper

#: Mean difference of logits that is rounding, as a share of their standard deviation: by the bytes of their type.
_ROUNDING = {2: 0.05, 4: 1e-3, 8: 1e-4}
_LENGTHS, _STEPS = (3, 6), 3


@torch.inference_mode()
def compare_static_step(runner: HFStepper, build: Callable[[], HFStepper]) -> str | None:
    """Return the reason why a model's static step is not right; None where it gives what other steps give.

    A model may read masks or positions in a way of its own: two sequences of different lengths show it.

    Args:
        runner: Stepper that shall run the static step; its probes read for the first time.
        build: Function that builds another stepper of the model.
    """
    vocabulary = runner.config.vocab_size
    prompts = [[(7 * i + 11 * length) % vocabulary for i in range(length)] for length in _LENGTHS]
    following = [[(5 * step + 3 * row) % vocabulary for row in range(len(prompts))] for step in range(_STEPS)]
    expected, cache, step = [], None, None
    try:
        for row, prompt in enumerate(prompts):
            stepper, alone = _read(build, prompt), _read(build, prompt)
            expected.append(torch.stack([alone.step(torch.tensor([ids[row]]).to(alone.device)).logits
                                         for ids in following], 2))  # fmt: skip
            if cache is None:
                cache = build_allocator(stepper, Buckets(8))
                cache.reserve(len(prompts), max(_LENGTHS) + _STEPS)
            cache.admit(stepper)
        assert cache is not None
        step = StaticStep(runner, cache.cache)
        outputs = []
        for ids in following:
            slots = torch.zeros(cache.cache.slots, dtype=torch.long, device=cache.cache.device)
            slots[cache.slots] = torch.tensor(ids, device=cache.cache.device)
            outputs.append(step.run(slots).logits[:, cache.slots])
    except Exception as error:  # a model's forward raises any error
        return (
            f"its forward does not take a static cache ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        )
    return _compare(torch.stack(outputs, 2), torch.cat(expected, 1))


def _read(build: Callable[[], HFStepper], prompt: list[int]) -> HFStepper:
    stepper = build()
    deque(stepper.start([prompt]), maxlen=0)
    return stepper


def _compare(ours: Tensor, theirs: Tensor) -> str | None:
    size = theirs.element_size()
    ours, theirs = ours.double(), theirs.double()
    if not theirs.isfinite().all():
        return None  # decoding reports it
    difference, spread = float((ours - theirs).abs().mean()), float(theirs.std())
    if difference <= _ROUNDING[size] * spread:
        return None
    return f"over a static cache its logits differ by {difference:.2g}, and their standard deviation is {spread:.2g}"
