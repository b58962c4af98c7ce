"""Prompts read with logits at some places only: the same logits, scores and signals as with all of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selfdoubt import density, sample, sculpt, vote
from selfdoubt.errors import NonFiniteError
from selfdoubt.lm import reading
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.hidden_states import HiddenStatePooler
from selfdoubt.lm.prefill import prefill, skip_scores
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.reading import HeadTap, read_prompts
from selfdoubt.lm.stepper import HFStepper
from tests.zoo import causal, prompts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = (9, 4, 1, 7)


def capped():
    """Build a model that changes logits behind its head."""
    model = copy.deepcopy(causal("gemma2"))
    model.config.final_logit_softcapping = 0.5
    return model


def fitted(model):
    wrapped = density.Wrapper()(model)
    rows = torch.tensor(prompts(12, 12, 12, 12))
    density.fit(wrapped, [{"input_ids": rows}], [{"input_ids": rows.flip(0)}])
    return wrapped


MODELS = {
    "plain": lambda: causal("llama"),
    "gpt2": lambda: causal("gpt2"),
    "cap": capped,
    "vote": lambda: vote.Wrapper(n_voters=3, weight_noise=0.05)(causal("llama")),
    "base row": lambda: vote.Wrapper(n_voters=3, weight_noise=0.05, answer_from="base")(causal("llama")),
    "sample": lambda: sample.Wrapper(n_samples=3)(causal("llama")),
    "members in the head": lambda: vote.Wrapper(n_voters=3, weight_noise=0.05, param_filter="lm_head")(causal("llama")),
    "sculpt": lambda: sculpt.Wrapper()(causal("llama")),
    "vote around a sculpt": lambda: vote.Wrapper(n_voters=2, weight_noise=0.05)(sculpt.Wrapper()(causal("llama"))),
    "density": lambda: fitted(causal("llama")),
    "vote around a density": lambda: vote.Wrapper(n_voters=2, weight_noise=0.05)(fitted(causal("llama"))),
}
RUNS = {
    "cap": "columns", "members in the head": "columns", "sculpt": "columns", "vote around a sculpt": "columns"
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Forget how heads ran in other tests."""
    monkeypatch.setattr(reading, "_RUNS", type(reading._RUNS)())


def lengths_for(name):
    """Return lengths of four prompts; padding makes NaN of this family's eager attention."""
    return (9, 9, 9, 9) if name == "cap" else LENGTHS


def choose_places(lengths, seed=0):
    """Choose some tokens of each prompt to score."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, generator=generator) < 0.5).tolist() for n in lengths]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 61 * 4 * 8])
def test_logits_at_places_are_those_of_all_columns(name, chunk, monkeypatch):
    model, lengths = MODELS[name](), lengths_for(name)
    starts = prompts(*lengths)
    expected = [output for _, output in HFStepper(model).start(starts)]
    (whole,) = expected  # small enough for one piece
    if chunk is not None:
        monkeypatch.setattr(reading, "_CHUNK", chunk)
        monkeypatch.setattr(reading, "_BLOCK", 1)
    places = torch.rand(len(starts), max(lengths), generator=torch.Generator().manual_seed(3)) < 0.4
    read = torch.zeros_like(places)
    pieces = 0
    for piece in read_prompts(HFStepper(model), starts, places):
        pieces += 1
        for block in piece.blocks:
            at = block.sequences, block.columns
            read[at] = True
            assert_close(block.output.logits, whole.logits[:, at[0], at[1]], **CLOSE)
            assert (block.output.scale is None) == (whole.scale is None)
            if whole.scale is not None:
                assert_close(block.output.scale, whole.scale[:, at[0], at[1]], **CLOSE)
            assert block.output.signals.keys() == whole.signals.keys()
            used = torch.tensor([c >= max(lengths) - lengths[s] for s, c in zip(*map(list, at), strict=True)])
            for key, signal in whole.signals.items():
                assert_close(block.output.signals[key][:, used], signal[:, at[0], at[1]][:, used], rtol=1e-3, atol=1e-3)
            assert block.output.has_base == whole.has_base
    assert torch.equal(read, places)
    assert_close(piece.last.logits, whole.at(-1).logits, **CLOSE)
    assert (pieces > 1) == (chunk is not None)
    assert HeadTap(HFStepper(model)).run == RUNS.get(name, "apart")


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_some_tokens_are_those_of_all(name):
    model, lengths = MODELS[name](), lengths_for(name)
    starts, scored = prompts(*lengths), choose_places(lengths)

    def read(scored):
        stepper = HFStepper(model, (0, 1), probes=find_probes(model))
        pool = HiddenStatePooler([[(n - 1, n), (0, n)] for n in lengths], lengths)
        tokens, last = prefill(stepper, starts, 2, pool, scored)
        return tokens, last, pool.means, stepper.step(torch.tensor([3, 4, 5, 6]))

    expected, last, means, step = read(None)
    some, last_of_some, means_of_some, step_of_some = read(scored)
    for row, flags in enumerate(scored):
        for place, flag in enumerate(flags):
            token, other = some[row][place], expected[row][place]
            assert (token is not None) == (flag and place > 0)
            if token is not None:
                assert (token.id, [i for i, _ in token.alternatives]) == (other.id, [i for i, _ in other.alternatives])
                for a, b in zip(token[1:9], other[1:9], strict=True):
                    assert (a is None and b is None) or a == pytest.approx(b, abs=1e-4)
                assert token.density == (None if other.density is None else pytest.approx(other.density, rel=1e-3))
    assert_close(means_of_some, means)
    for a, b in ((last_of_some, last), (step_of_some, step)):
        assert_close(a.logits, b.logits, **CLOSE)
        assert_close(a.states, b.states, **CLOSE)
        assert (a.attention is None) == (b.attention is None)
        assert a.attention is None or torch.allclose(a.attention, b.attention, atol=1e-5)
        assert a.signals.keys() == b.signals.keys()


def count_rows_of_head(model, read):
    """Return the number of positions that a model's head sees while ``read`` runs."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, logits: seen.append(logits.shape[:-1].numel()))
    read()
    handle.remove()
    return sum(seen)


def test_the_head_runs_only_where_it_is_needed():
    model, starts = causal("llama"), prompts(20, 20)
    scored = [[7 <= i < 10 for i in range(20)]] * 2
    read = lambda some: count_rows_of_head(model, lambda: prefill(HFStepper(model), starts, scored=some))  # noqa: E731
    read(scored)  # how the head runs is known now
    assert read(scored) == 2 * 3 + 2
    assert read(skip_scores(starts)) == 2


def test_the_head_gets_a_tensor_of_its_own():
    """A row that keeps the strides of a longer tensor, which counts as contiguous, takes 80 times as long."""
    model, strides = copy.deepcopy(causal("llama")), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: strides.append((inputs[0].shape, inputs[0].stride())))
    for _ in range(2):  # the first run finds out how the head can run
        prefill(HFStepper(model), prompts(9))
    assert len(strides) > 2
    for shape, stride in strides:
        assert stride == torch.empty(shape).stride()


def test_a_prompt_that_is_not_scored_still_has_its_next_logits():
    model, starts = causal("llama"), prompts(*LENGTHS)
    tokens, last = prefill(HFStepper(model), starts, scored=skip_scores(starts))
    assert tokens == [[None] * n for n in LENGTHS]
    assert_close(last.logits, prefill(HFStepper(model), starts)[1].logits, **CLOSE)


def test_the_sizer_chooses_the_pieces():
    model, starts = causal("llama"), prompts(30, 30)
    sizer = ChunkSizer()
    sizer.begin(1.0)
    pieces = [p.columns for p in read_prompts(HFStepper(model, (), sizer), starts, torch.ones(2, 30, dtype=torch.bool))]
    assert sum(pieces) == 30
    assert len(pieces) > 1


def test_nan_at_a_place_that_is_scored():
    model, starts = causal("llama"), prompts(6)
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight.data[starts[0][2]] = math.nan
    with pytest.raises(NonFiniteError, match=r"^3 of 3 positions"):
        prefill(HFStepper(broken), starts, scored=[[False, False, False, True, True, True]])


def test_a_head_that_is_not_called_as_a_module():
    class Direct(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, past_key_values=None, use_cache=True, **more):
            out = self.inner.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **more)
            out["logits"] = nn.functional.linear(out.last_hidden_state, self.inner.lm_head.weight)
            return out

    model, starts = Direct(causal("llama")), prompts(*LENGTHS)
    scored = choose_places(LENGTHS)
    expected, last = prefill(HFStepper(causal("llama")), starts, scored=scored)
    tokens, last_here = prefill(HFStepper(model), starts, scored=scored)
    assert HeadTap(HFStepper(model)).run == "whole"
    assert_close(last_here.logits, last.logits, **CLOSE)
    for row, others in zip(tokens, expected, strict=True):
        assert [t and round(t.logprob, 4) for t in row] == [t and round(t.logprob, 4) for t in others]
