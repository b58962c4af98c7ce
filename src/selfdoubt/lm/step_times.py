"""Times of a model's steps and of its prefill, as ``doctor`` shows them."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median

from torch import nn

from selfdoubt.lm.decode import TokenSequence, decode_batch
from selfdoubt.lm.decoding import start_decoding
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.hardware import synchronize
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import build_stepper
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper

#: Steps that run before those that are timed.
WARM_STEPS = 2


def time_plain_steps(model: nn.Module, ids: list[int], steps: int) -> float:
    """Return the median time of steps that only choose the most probable token."""
    stepper = HFStepper(model)
    output = list(stepper.start([ids]))[-1][1].at(-1)
    seconds = []
    device = output.logits.device
    for _ in range(WARM_STEPS + steps):
        synchronize(device)
        begin = time.perf_counter()
        output = stepper.step(output.logits[0].argmax(-1))
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[WARM_STEPS:])


def time_steps(lm: ModelWithFront, ids: list[int], steps: int) -> float:
    """Return the median time from one token to the next, each with its risk."""
    stepper = build_stepper(lm)
    _, following = prefill(stepper, [ids])
    sequence = TokenSequence(0, Sampling(max_tokens=WARM_STEPS + steps + 1), 0, 2**62)
    times = [time.perf_counter()]
    for _ in decode_batch(start_decoding(lm, stepper, following, [sequence])):
        times.append(time.perf_counter())  # noqa: PERF401
    pauses = [later - earlier for earlier, later in pairwise(times)]
    return median(pauses[WARM_STEPS:])


def time_prefill(lm: ModelWithFront, ids: list[int]) -> float:
    """Return the tokens per second at which a prompt is read and scored, the quicker of two."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        prefill(build_stepper(lm), [ids])
        seconds.append(time.perf_counter() - begin)
    return len(ids) / min(seconds)
