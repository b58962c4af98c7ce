"""The token loop on a mock model of a few lines: no text, no model library."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from selfdoubt.distributions import Distributions
from selfdoubt.errors import ConfigError, NonFiniteError
from selfdoubt.lm.decode import decode
from selfdoubt.lm.prefill import prefill, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.sampling import Sampling, choose_tokens
from selfdoubt.lm.step_output import StepOutput, Stepper

CLASSES, FALSE_ALARM = 11, 1e-10


class Mock:
    """What comes next is a fixed function of the last two tokens; two members disagree a little."""

    context: int | None = None

    def __init__(self, columns=3, scaled=False):
        self.columns, self.scaled, self.kept, self.steps = columns, scaled, [], 0
        self.table = 2 * torch.randn(2, CLASSES, CLASSES, CLASSES, generator=torch.Generator().manual_seed(0)).double()

    def _logits(self, before, last):
        logits = self.table[:, before, last]
        return StepOutput(logits, logits.exp() if self.scaled else None)

    def start(self, prompts):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width + 1 - len(p)) + list(p) for p in prompts])
        self.last = ids[:, -2:]
        for first in range(0, width, self.columns):
            part = ids[:, first : first + self.columns + 1]
            yield first, self._logits(part[:, :-1], part[:, 1:])

    def step(self, ids):
        self.steps += 1
        self.last = torch.stack([self.last[:, 1], ids], 1)
        return self._logits(*self.last.T)

    def extend(self, texts):
        width = max(map(len, texts))
        ids = torch.cat([self.last, torch.tensor([list(t) + [0] * (width - len(t)) for t in texts])], 1)
        for first in range(0, width, self.columns):
            part = ids[:, first + 1 : first + self.columns + 2]
            yield first, self._logits(part[:, :-1], part[:, 1:])

    def keep(self, sequences):
        self.kept.append(list(sequences))
        self.last = self.last[sequences]

    def join(self, other):
        self.last = torch.cat([self.last, other.last])


def run(prompts, seeds=None, stepper=None, **options):
    """Ids and endings of each sequence."""
    stepper = stepper or Mock()
    _, following = prefill(stepper, prompts)
    ids: list[list[int]] = [[] for _ in prompts]
    ends: list[str | None] = [None] * len(prompts)
    lengths, seeds = [len(p) for p in prompts], seeds or [0] * len(prompts)
    for event in decode(stepper, following, lengths, Sampling(**options), seeds):
        assert ends[event.sequence] is None, "an event after the end"
        ends[event.sequence] = event.finish
        if event.token is not None:
            ids[event.sequence].append(event.token.id)
    return ids, ends


def by_hand(prompt, n):
    """Greedy tokens of one sequence without the loop under test."""
    table, ids = Mock().table, [0, *prompt]
    for _ in range(n):
        probs = table[:, ids[-2], ids[-1]].softmax(-1).mean(0)
        ids.append(int(probs.argmax()))
    return ids[len(prompt) + 1 :]


def test_the_mock_is_a_stepper():
    assert isinstance(Mock(), Stepper)


def test_greedy_takes_the_most_probable_token_of_the_mean():
    prompts = [[3], [4, 5, 6], [7, 8]]
    ids, ends = run(prompts, max_tokens=9)
    assert ids == [by_hand(p, 9) for p in prompts]
    assert ends == ["length"] * 3


def flat(tokens):
    """All numbers of scored tokens."""
    return torch.tensor([[*t[:7], *(x for pair in t.alternatives for x in pair)] for t in tokens[1:]]).double()


@pytest.mark.parametrize("columns", [1, 2, 3, 100])
def test_a_prompt_is_scored_alike_in_pieces_of_any_width(columns):
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3]]
    scored, following = prefill(Mock(columns), prompts, alternatives=2)
    whole, last = prefill(Mock(), prompts, alternatives=2)
    assert torch.equal(following.logits, last.logits)
    for tokens, others, prompt in zip(scored, whole, prompts, strict=True):
        assert tokens[0] is None
        assert_close(flat(tokens), flat(others))
        assert [t.id for t in tokens[1:]] == prompt[1:]
        alone, _ = prefill(Mock(columns), [prompt], alternatives=2)
        assert_close(flat(tokens), flat(alone[0]))


def test_scores_of_a_prompt_against_their_definitions():
    prompt = [3, 1, 4]
    (tokens,), _ = prefill(Mock(scaled=True), [prompt], alternatives=3)
    probs = Mock().table[:, 3, 1].softmax(-1)
    found, mean = tokens[2], probs.mean(0)
    assert found.logprob == pytest.approx(mean[4].log().item())
    assert found.total == pytest.approx(stats.entropy(mean))
    assert found.aleatoric == pytest.approx(stats.entropy(probs, axis=-1).mean())
    assert found.spread == pytest.approx(probs[:, 4].std(correction=0).item())
    assert found.disagreement == (probs.argmax(-1) != 4).double().mean()
    assert found.scale == pytest.approx(Mock().table[:, 3, 1, 4].exp().square().mean().sqrt().item())
    top = mean.topk(3)
    assert [i for i, _ in found.alternatives] == top.indices.tolist()
    assert [math.exp(p) for _, p in found.alternatives] == pytest.approx(top.values.tolist())


@pytest.mark.parametrize("columns", [1, 3, 100])
def test_a_text_that_follows_is_scored_as_if_it_were_read_with_its_prompt(columns):
    prompts, texts = [[1, 2, 3], [4]], [[5, 1, 2, 2, 3], [6]]
    stepper = Mock(columns)
    _, following = prefill(stepper, prompts)
    found = run_to_end(teacher_force_in_chunks(stepper, following, texts, alternatives=2))
    together, _ = prefill(Mock(), [p + t for p, t in zip(prompts, texts, strict=True)], alternatives=2)
    assert [len(f) for f in found] == [5, 1]
    for own, prompt, expected in zip(found, prompts, together, strict=True):
        for a, b in zip(own, expected[len(prompt) :], strict=True):
            assert a.id == b.id
            assert a[1:7] == pytest.approx(b[1:7], abs=1e-9)


def test_a_stop_token_ends_a_sequence_and_is_no_part_of_it():
    prompts = [[3], [4, 5, 6], [7, 8]]
    free = [by_hand(p, 20) for p in prompts]
    stop = free[1][4]
    expected = [f[: f.index(stop)] if stop in f else f for f in free]
    ids, ends = run(prompts, max_tokens=20, stop_ids=frozenset({stop}))
    assert ids == expected
    assert ends == ["stop" if stop in f else "length" for f in free]
    assert len({len(e) for e in expected}) > 1  # they end at different times


def test_finished_sequences_leave_the_batch():
    prompts, stepper = [[3], [4, 5, 6], [7, 8], [1]], Mock()
    free = [by_hand(p, 12) for p in prompts]
    run(prompts, max_tokens=12, stop_ids=frozenset({free[0][2]}), stepper=stepper)
    assert stepper.kept
    sizes = [4, *(len(k) for k in stepper.kept)]
    assert sizes == sorted(set(sizes), reverse=True)


def test_no_step_is_taken_after_the_last_token():
    stepper = Mock()
    run([[3], [4]], max_tokens=5, stepper=stepper)
    assert stepper.steps == 4


def test_the_context_is_a_limit_of_each_sequence():
    stepper = Mock()
    stepper.context = 8
    ids, ends = run([[3], [4, 5, 6, 7, 8]], max_tokens=100, stepper=stepper)
    assert [len(i) for i in ids] == [7, 3]
    assert ends == ["length", "length"]


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.8}])
def test_a_seed_gives_the_same_tokens_in_any_batch(options):
    prompts, seeds = [[3], [4, 5, 6], [7, 8], [1]], [5, 6, 5, 7]
    together, _ = run(prompts, seeds, max_tokens=15, **options)
    alone = [run([p], [s], max_tokens=15, **options)[0][0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    turned, _ = run(prompts[::-1], seeds[::-1], max_tokens=15, **options)
    assert turned[::-1] == together


def test_other_seeds_give_other_tokens():
    answers = {tuple(run([[3]], [s], max_tokens=15, temperature=1.0)[0][0]) for s in range(20)}
    assert len(answers) == 20  # 15 tokens of about two nats each: a double has probability below 1e-9


def test_a_sequence_that_ends_does_not_move_the_draws_of_others():
    prompts = [[3], [4, 5, 6]]
    free, _ = run(prompts, [1, 2], max_tokens=12, temperature=1.5)
    stop = next(t for t in free[0] if t not in free[1])
    ids, ends = run(prompts, [1, 2], max_tokens=12, temperature=1.5, stop_ids=frozenset({stop}))
    assert ends[0] == "stop"
    assert ids[1] == free[1]


def choose(logits, sampling, uniform):
    return choose_tokens(Distributions.measure(logits), [sampling] * len(logits), uniform)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.7), (2.0, 0.3)])
def test_frequencies_against_exact_probabilities(temperature, top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, -0.7], dtype=torch.float64)
    probs = (logits / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept, mass = [], 0.0
    for i in order.tolist():
        kept.append(i)
        mass += probs[i].item()
        if mass >= top_p:
            break
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose_tokens(
        Distributions.measure(logits.expand(n, -1)), [Sampling(temperature=temperature, top_p=top_p)] * n, uniform
    )
    counts = torch.bincount(chosen, minlength=6)
    assert set(counts.nonzero().flatten().tolist()) == set(kept)
    if len(kept) > 1:
        expected = n * probs[kept] / probs[kept].sum()
        assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 5e-324])
def test_cold_is_greedy(temperature):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    chosen = choose_tokens(
        Distributions.measure(logits),
        [Sampling(temperature=temperature)] * 50,
        torch.full((50,), 0.999, dtype=torch.float64),
    )
    assert torch.equal(chosen, logits.argmax(-1))


def test_the_smallest_top_p_keeps_one_token():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    chosen = choose_tokens(
        Distributions.measure(logits),
        [Sampling(temperature=1.0, top_p=1e-9)] * 50,
        torch.full((50,), 0.999, dtype=torch.float64),
    )
    assert torch.equal(chosen, logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_choose_probable_tokens(uniform):
    logits = torch.tensor([[0.0, -math.inf, 1.0, -800.0]])
    chosen = choose_tokens(
        Distributions.measure(logits), [Sampling(temperature=1.0)], torch.tensor([uniform], dtype=torch.float64)
    )
    assert chosen.item() in (0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_numbers_that_are_not_finite_raise(bad, where):
    stepper = Mock()
    stepper.table[1, 3, 4, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 of "):
        run([[3, 4, 5] if where == "prompt" else [3, 4]], max_tokens=3, stepper=stepper)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, r"temperature must be finite and at least 0, got -1\.0"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"temperature": math.inf}, "temperature .* got inf"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p .* got 1\.5"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"alternatives": -1}, "alternatives must not be negative, got -1"),
    ],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ConfigError, match=f"^{words}$"):
        Sampling(**options)
