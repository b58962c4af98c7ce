"""Tables of token scores: traced and captured as one graph, equal to the scores one by one, and loud about NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from selfdoubt import risk
from selfdoubt.errors import NonFiniteError
from selfdoubt.lm import token_table
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.token_table import TokenTable, choose_and_tabulate, read_table, score_ids, tabulate
from tests.plain import run

CLASSES = 301
KINDS = {"one": (1, False), "three": (3, False), "base": (4, True)}


def step_of(kind, seed=0, dtype=torch.float32, device="cpu"):
    """Build an output of two sequences and three positions, with a scale and all signals."""
    members, has_base = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(members, 2, 3, CLASSES, generator=generator)
    scale = torch.rand(1 if has_base else members, 2, 3, CLASSES, generator=generator)
    signals = {name: torch.rand(1, 2, 3, generator=generator).to(device) for name in ("layer_disagreement", "density")}
    return StepOutput(logits.to(device, dtype), scale.to(device, dtype), None, None, signals=signals, has_base=has_base)


def chosen_ids(device="cpu"):
    return torch.randint(CLASSES, (2, 3), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_answer", [False, True])
@pytest.mark.parametrize("alternatives", [0, 5])
def test_a_table_has_the_scores_one_by_one(kind, is_answer, alternatives):
    step, chosen = step_of(kind), chosen_ids()
    tokens = score_ids(step, chosen, alternatives, is_answer=is_answer)
    assert [[token.id for token in row] for row in tokens] == chosen.tolist()
    scores = risk.token_scores(step.logits, chosen, has_base=step.has_base)
    for name, column in scores._asdict().items():
        values = [[getattr(token, name) for token in row] for row in tokens]
        if column is None:
            assert values == [[None] * 3] * 2
        else:
            assert_close(torch.tensor(values), column)
    sure = risk.confidence_scores(step.mixture)
    top = step.mixture.log_softmax(-1).topk(5)
    for row in range(2):
        for t, token in enumerate(tokens[row]):
            assert token.density == pytest.approx(float(step.signals["density"][0, row, t]))
            variance = step.scale[:, row, t, token.id].double().square().mean()
            assert token.scale == pytest.approx(float(variance.sqrt()))
            assert len(token.alternatives) == alternatives
            assert [i for i, _ in token.alternatives] == top.indices[row, t, :alternatives].tolist()
            expected = top.values[row, t, :alternatives].tolist()
            assert [p for _, p in token.alternatives] == pytest.approx(expected, abs=1e-5)
            gap = float(top.values[row, t, 0]) - token.logprob if is_answer or alternatives else 0.0
            assert token.gap == pytest.approx(gap, abs=1e-5)
            if is_answer:
                assert token.margin == pytest.approx(float(sure.margin[row, t]), abs=1e-6)
                assert token.self_certainty == pytest.approx(float(sure.self_certainty[row, t]), abs=1e-5)
                assert token.layer_disagreement == pytest.approx(float(step.signals["layer_disagreement"][0, row, t]))
            else:
                assert token.margin is token.self_certainty is token.layer_disagreement is None


def test_a_table_is_traced_as_one_graph():
    # Without the checks of shapes that pytest adds, which cannot be traced.
    run("""
import itertools, torch
from selfdoubt.lm.token_table import tabulate
from tests.unit.lm.test_token_table import KINDS, chosen_ids, step_of

for kind, is_answer, alternatives in itertools.product(KINDS, [False, True], [0, 5]):
    torch._dynamo.reset()
    graph = torch.compile(tabulate, fullgraph=True, backend="aot_eager")
    for seed in (0, 7):
        step, chosen = step_of(kind, seed), chosen_ids()
        expected, table = (f(step, chosen, alternatives, is_answer=is_answer) for f in (tabulate, graph))
        assert (table.names, table.alternatives) == (expected.names, expected.alternatives)
        torch.testing.assert_close(table.numbers, expected.numbers, rtol=0, atol=1e-6)
""")


def without_waiting(step, chosen, alternatives, is_answer):
    """Tabulate tensors without data: whatever reads a value fails."""
    meta = StepOutput(
        step.logits.to("meta"),
        step.scale.to("meta"),
        signals={name: x.to("meta") for name, x in step.signals.items()},
        has_base=step.has_base,
    )
    return tabulate(meta, chosen.to("meta"), alternatives, is_answer=is_answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_answer", [False, True])
@pytest.mark.parametrize("alternatives", [0, 5])
def test_no_value_is_read_before_the_end(kind, is_answer, alternatives):
    step, chosen = step_of(kind), chosen_ids()
    table = without_waiting(step, chosen, alternatives, is_answer)
    expected = tabulate(step, chosen, alternatives, is_answer=is_answer)
    assert (table.names, table.numbers.shape) == (expected.names, expected.numbers.shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_captures_a_table(kind, dtype):
    static, chosen = step_of(kind, 0, dtype, "cuda"), chosen_ids("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first run outside, as captures need
        tabulate(static, chosen, 5, is_answer=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = tabulate(static, chosen, 5, is_answer=True)
    for seed in (3, 4):
        step = step_of(kind, seed, dtype, "cuda")
        static.logits.copy_(step.logits)
        static.scale.copy_(step.scale)
        for name, signal in step.signals.items():
            static.signals[name].copy_(signal)
        graph.replay()
        expected = tabulate(step, chosen, 5, is_answer=True)
        assert_close(table.numbers, expected.numbers, rtol=1e-6, atol=1e-6)


BAD = {
    "nan": (math.nan, slice(5, 6)),
    "plus": (math.inf, slice(5, 6)),
    "minus": (-math.inf, slice(5, 6)),
    "row of nan": (math.nan, slice(None)),
    "row of plus": (math.inf, slice(None)),
    "row of minus": (-math.inf, slice(None)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_answer", [False, True])
@pytest.mark.parametrize("alternatives", [0, 5])
@pytest.mark.parametrize(
    ("kind", "member"), [("one", 0), ("three", 0), ("three", 2), ("base", 0), ("base", 1), ("base", 3)]
)
def test_logits_that_are_not_finite_show_in_the_table(kind, member, bad, is_answer, alternatives):
    step, chosen = step_of(kind), chosen_ids()
    value, where = BAD[bad]
    step.logits[member, 1, 2, where] = value
    table = tabulate(step, chosen, alternatives, is_answer=is_answer)
    message = r"^1 of 6 positions have NaN or infinite logits; .* check the model's weights and dtype"
    with pytest.raises(NonFiniteError, match=message):
        read_table(table)
    # The other positions keep their scores.
    others = table.numbers.clone()
    others[1, 2] = 0
    fine = tabulate(step_of(kind), chosen, alternatives, is_answer=is_answer).numbers
    fine[1, 2] = 0
    assert_close(others, fine, rtol=0, atol=1e-6)
    assert len(read_table(TokenTable(others, table.names, table.alternatives))) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_answer", [False, True])
@pytest.mark.parametrize("alternatives", [0, 5])
@pytest.mark.parametrize("positions", [1, 2, 4])
def test_blocks_of_positions_are_all_positions(kind, is_answer, alternatives, positions, monkeypatch):
    step, chosen = step_of(kind), chosen_ids()
    expected = tabulate(step, chosen, alternatives, is_answer=is_answer)
    monkeypatch.setattr(token_table, "_BLOCK", positions * CLASSES * len(step.logits))
    table = tabulate(step, chosen, alternatives, is_answer=is_answer)
    assert (table.names, table.alternatives) == (expected.names, expected.alternatives)
    assert torch.equal(table.numbers, expected.numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_tokens_are_chosen_block_by_block_from_the_mean(kind, rows, monkeypatch):
    whole = step_of(kind).flatten()
    expected = whole.mixture.argmax(-1)
    monkeypatch.setattr(token_table, "_BLOCK", rows * CLASSES * len(whole.logits))
    spans = []

    def choose(span, answer):
        spans.append(span)
        assert torch.equal(answer.top, expected[span])
        return answer.top

    table, chosen = choose_and_tabulate(whole, choose, 3)
    assert len(spans) == -(-6 // rows)
    assert torch.equal(chosen, expected)
    assert torch.equal(table.numbers, tabulate(whole.at(None), chosen[:, None], 3, is_answer=True).numbers)
