"""Members that fork at the first layer they change, against members that are rows from the first layer on."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import SlowWarning, WrapError
from selfdoubt.lm import late_fork
from selfdoubt.lm.late_fork import LateFork
from selfdoubt.lm.prefill import prefill, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.stepper import HFStepper
from tests.ladder.test_families import CLOSE
from tests.zoo import FAMILIES, causal, prompts

#: Members that begin at the second of two layers, whatever the family calls its layers.
LAST = r"\.1\..*(q_proj|v_proj|qkv_proj|c_attn|query_key_value)"
WRAPPERS = {
    "vote": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, param_filter=LAST),
    "base": vote.Wrapper(n_voters=2, weight_noise=0.5, param_filter=LAST, answer_from="base"),
    "sample": sample.Wrapper(n_samples=3, distribution=sample.Bernoulli(0.3), param_filter=LAST),
}


def steppers(model, **options):
    """The full fork and the late one."""
    late = HFStepper(model, **options)
    assert isinstance(late._fork, LateFork)
    return HFStepper(model, fork=None, **options), late


def rows_of(stepper):
    return [len(layer.keys) for layer in stepper._cache.layers]


def same(full, late):
    assert_close(late.logits, full.logits, **CLOSE)
    for name in ("scale", "states", "attention"):
        ours, theirs = getattr(late, name), getattr(full, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert_close(ours, theirs, **CLOSE)
    assert late.signals.keys() == full.signals.keys()
    for name, signal in full.signals.items():
        assert_close(late.signals[name], signal, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_cached_steps(family, name):
    model = WRAPPERS[name](causal(family))
    members = model.spec.members(training=False)
    pair = steppers(model)
    for lengths in ((7,), (7, 7)):
        full, late = [prefill(stepper, prompts(*lengths))[1] for stepper in pair]
        same(full, late)
        assert (late.logits[0] - late.logits[-1]).abs().max() > 1e-3
        for ids in torch.tensor(prompts(*[8] * len(lengths), seed=1)).T:  # beyond the sliding windows
            same(*(stepper.step(ids) for stepper in pair))
        assert rows_of(pair[1]) == [len(lengths), members * len(lengths)]
        assert rows_of(pair[0]) == [members * len(lengths)] * 2


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])  # with left padding it is NaN by itself
def test_padding_leaving_and_joining(family, name):
    model = WRAPPERS[name](causal(family))
    pair, guests = steppers(model), steppers(model)
    for stepper, guest in zip(pair, guests, strict=True):
        prefill(stepper, prompts(3, 9, 5))
        prefill(guest, prompts(12, 4, seed=2))
    same(*(stepper.step(torch.tensor([4, 5, 6])) for stepper in pair))
    for stepper in pair:
        stepper.keep([2, 0, 2])
    same(*(stepper.step(torch.tensor([7, 8, 9])) for stepper in pair))
    for stepper, guest in zip(pair, guests, strict=True):
        stepper.join(guest)
    for ids in torch.tensor(prompts(4, 4, 4, 4, 4, seed=3)).T:
        same(*(stepper.step(ids) for stepper in pair))
    for stepper in pair:
        stepper.keep([1])
        assert stepper._mask is None
    same(*(stepper.step(torch.tensor([9])) for stepper in pair))
    assert rows_of(pair[1]) == [1, model.spec.members(training=False)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_texts_are_scored_alike(family):
    model = WRAPPERS["vote"](causal(family))
    found = []
    for stepper in steppers(model):
        _, following = prefill(stepper, prompts(3, 9))
        stepper.keep([0, 1, 1])
        texts = prompts(5, 2, 7, seed=4)
        found.append(run_to_end(teacher_force_in_chunks(stepper, following.select([0, 1, 1]), texts, 2)))
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            numbers = [[x for x in token if isinstance(x, float)] for token in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)


def deep(layers=6):
    config = copy.deepcopy(causal("llama").config)
    config.num_hidden_layers = layers
    config.layer_types = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("answer_from", ["mean", "base"])
@pytest.mark.parametrize("first", [1, 3, 5])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_probes_and_states_see_the_same(kind, first, answer_from):
    base = deep()
    base.set_attn_implementation(kind)
    inner = sculpt.Wrapper(rank=4)(base)
    spec = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, answer_from=answer_from, param_filter=rf"\.[{first}-5]\.")
    model = spec(inner)
    assert len(find_probes(model)) >= 1
    pair = [HFStepper(model, range(6), probes=find_probes(model), **options) for options in ({"fork": None}, {})]
    assert pair[1]._fork.first == first
    for ids in ([5, 8] if kind == "sdpa" else [5, 5], [6]):  # eager attention is NaN in float64 behind padding
        same(*(prefill(stepper, prompts(*ids))[1] for stepper in pair))
        same(*(stepper.step(torch.tensor([3] * len(ids))) for stepper in pair))


def test_members_in_the_head_alone_fork_at_the_last_layer():
    model = vote.Wrapper(n_voters=2, rank=2, param_filter="lm_head")(deep(3))
    full, late = steppers(model)
    assert late._fork.first == 2
    same(prefill(full, prompts(5))[1], prefill(late, prompts(5))[1])


@pytest.mark.parametrize(
    "spec",
    [
        vote.Wrapper(n_voters=2),
        vote.Wrapper(n_voters=2, rank=2, param_filter=r"embed_tokens|\.1\..*q_proj"),
        vote.Wrapper(n_voters=1, rank=2, param_filter=LAST),
        vote.Wrapper(n_voters=2, param_filter=LAST, compile=True),
        sculpt.Wrapper(),
    ],
    ids=["first layer", "embedding", "one member", "compiled", "sculpt"],
)
def test_no_late_fork_and_no_warning(spec):
    assert HFStepper(spec(causal("llama")))._fork is None


def test_it_is_checked_once_per_model(monkeypatch):
    model, checks = WRAPPERS["vote"](causal("llama")), []
    check = late_fork._check

    def count(fork, *more):
        checks.append(fork)
        check(fork, *more)

    monkeypatch.setattr(late_fork, "_check", count)
    first, second = HFStepper(model)._fork, HFStepper(model)._fork
    assert first is second is checks[0]
    assert len(checks) == 1


class Strange(nn.Module):
    """A layer around another one that is handed rows of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, shift=None, **kwargs):
        return self.layer(hidden_states + shift.repeat(len(hidden_states) // len(shift), 1, 1), **kwargs)


@pytest.mark.parametrize("fault", ["argument", "result", "error"])
def test_a_model_that_cannot_fork_late_warns_once_and_forks_at_the_input(fault):
    base = copy.deepcopy(causal("llama"))
    if fault == "argument":
        base.model.layers = nn.ModuleList(Strange(layer) for layer in base.model.layers)
        hook = lambda m, args, kwargs: (args, kwargs | {"shift": args[0].clone()})  # noqa: E731
        for layer in base.model.layers:
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        reason = r"its layers get shift of shape \(2, 7, 16\)"
    elif fault == "result":  # a layer whose rows see their number in the batch
        base.model.layers[0].register_forward_hook(lambda m, args, y: y + torch.arange(len(y))[:, None, None])
        reason = r"logits differ by .* more than 0\.001"
    else:

        def refuse(module, args, kwargs):
            rows = len(kwargs["past_key_values"].layers[0].keys)
            if rows != len(kwargs["hidden_states"]):
                raise RuntimeError(f"{rows} rows below\nmore lines")

        base.model.layers[1].self_attn.register_forward_pre_hook(refuse, with_kwargs=True)
        reason = r"\(2 rows below\)$"
    filter_ = r"\.1\..*q_proj"
    model = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, param_filter=filter_)(base)
    with pytest.warns(SlowWarning, match=reason) as caught:
        stepper = HFStepper(model)
    assert "\n" not in str(caught[0].message)
    assert re.match("^all 3 members run from the first layer on", str(caught[0].message))
    assert stepper._fork is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HFStepper(model)._fork is None


def test_caches_of_two_forks_are_not_joined():
    model = WRAPPERS["vote"](causal("llama"))
    full, late = steppers(model)
    for stepper in (full, late):
        prefill(stepper, prompts(4))
    with pytest.raises(WrapError, match="fork into members at different layers"):
        full.join(late)
