"""The loss without logits equals the loss with logits, for every family and wrapper, and so do its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.train import head as heads
from selfdoubt.train.batches import collate
from selfdoubt.train.head import compute_mixture_losses, get_head, run_trunk, sum_losses, sum_sculpted_losses
from tests.zoo import FAMILIES, causal

WRAPPERS = {
    "none": None,
    "vote": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5),
    "sample": sample.Wrapper(n_samples=3),
    "vote on the head too": vote.Wrapper(n_voters=2, weight_noise=0.5, param_filter=".*"),
}


def rows(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (n,), generator=generator).tolist()
    examples = [
        {"ids": torch.randint(3, 60, (k,), generator=generator).tolist(), "counts": [False, False] + [True] * (k - 2)}
        for k in lengths
    ]
    return collate([[e] for e in examples], 1)


def inputs(batch):
    return {"input_ids": batch.ids, "use_cache": False}


def masked(batch):
    """The same with a mask over the padding, which a causal model does not need."""
    return inputs(batch) | {"attention_mask": (batch.segments > 0).long()}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("piece", [2**24, 200])
@pytest.mark.parametrize("name", ["none", "vote", "vote on the head too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_all_logits(family, name, piece, monkeypatch):
    monkeypatch.setattr(heads, "PIECE", piece)
    model = causal(family) if WRAPPERS[name] is None else WRAPPERS[name](causal(family))
    batch = rows()
    loss_mask = batch.labels >= 0
    whole = model(**masked(batch)) if name == "none" else model(**masked(batch), training=True)
    slow = F.cross_entropy(whole.logits[loss_mask].float(), batch.labels[loss_mask], reduction="sum")
    fast = sum_losses(
        run_trunk(model, inputs(batch), batch.chosen, training=True), get_head(model), batch.labels[loss_mask]
    )
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    if name != "none":
        wanted = torch.autograd.grad(slow, trained(model))
        assert_close(list(torch.autograd.grad(fast, trained(model))), list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("piece", [2**24, 300])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_validation_loss_is_that_of_the_mixture(family, name, piece, monkeypatch):
    monkeypatch.setattr(heads, "PIECE", piece)
    model = causal(family) if WRAPPERS[name] is None else WRAPPERS[name](causal(family))
    members = 1 if WRAPPERS[name] is None else model.spec.members(training=False)
    if name != "none":
        model.is_trained = True  # the mean over members answers
    batch = rows()
    loss_mask = batch.labels >= 0
    whole = (model if name == "none" else model.eval())(**masked(batch)).logits[loss_mask]
    grown = {k: v.repeat(members, 1) if torch.is_tensor(v) else v for k, v in inputs(batch).items()}
    chosen = loss_mask.repeat(members, 1).flatten().nonzero().flatten()
    head_input = run_trunk(model, grown, chosen, training=False)
    nll, right = compute_mixture_losses(head_input, get_head(model), batch.labels[loss_mask], members)
    assert_close(nll, F.cross_entropy(whole.float(), batch.labels[loss_mask], reduction="none"), rtol=1e-4, atol=1e-5)
    assert torch.equal(right, whole.argmax(-1) == batch.labels[loss_mask])


def test_the_validation_loss_is_that_of_the_voters_also_where_the_base_answers():
    from selfdoubt.train.config import TrainConfig
    from selfdoubt.train.module import RiskAwareModule

    losses = []
    for answer_from in ("mean", "base"):
        spec = vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5, answer_from=answer_from)
        module = RiskAwareModule(spec(causal("llama")), TrainConfig(data="", out="", wrapper=spec))
        module.validation_step(rows(), 0)
        losses.append((module.val_loss.compute(), module.val_accuracy.compute()))
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("piece", [2**24, 300])
def test_the_closed_likelihood_of_random_logits_is_near_their_mean(piece, monkeypatch):
    """Against 4,000 draws, whose own error is below 0.01 nats a token; the approximation is within a tenth."""
    monkeypatch.setattr(heads, "PIECE", piece)
    model = sculpt.Wrapper(initial_scale=0.8)(causal("llama"))
    batch = rows()
    loss_mask = batch.labels >= 0
    labels = batch.labels[loss_mask]
    head_input = run_trunk(model, inputs(batch), batch.chosen, training=True)
    closed = sum_sculpted_losses(head_input, get_head(model), labels, distribution=sculpt.Normal, draws=None)
    monkeypatch.setattr(heads, "PIECE", 2**24)
    drawn = sum_sculpted_losses(head_input, get_head(model), labels, distribution=sculpt.Normal, draws=4000)
    assert closed.item() == pytest.approx(drawn.item(), rel=0.1)
    (closed_grad,) = torch.autograd.grad(closed, trained(model)[-1])
    assert closed_grad.abs().sum() > 0


def test_a_scale_of_nothing_is_the_plain_loss():
    model = sculpt.Wrapper(initial_scale=1e-6)(causal("llama"))
    batch = rows()
    loss_mask = batch.labels >= 0
    head_input = run_trunk(model, inputs(batch), batch.chosen, training=True)
    base = causal("llama")
    plain_input = run_trunk(base, inputs(batch), batch.chosen, training=True)
    plain = sum_losses(plain_input, get_head(base), batch.labels[loss_mask])
    for draws in (None, 3):
        found = sum_sculpted_losses(
            head_input, get_head(model), batch.labels[loss_mask], distribution=sculpt.Normal, draws=draws
        )
        assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_draws_average_probabilities_not_losses():
    """With one token and two equally far draws: -log of the mean, which doubt can lower, not the mean of -log."""
    y, scale = torch.tensor([[0.0, 3.0]]), torch.tensor([[3.0, 3.0]])
    torch.manual_seed(0)
    probs = sculpt.Normal.sample((y.expand(20_000, 2), scale.expand(20_000, 2))).softmax(-1)[:, 0]
    assert -math.log(probs.mean()) < -probs.log().mean()
    closed = (y / (1 + math.pi / 8 * scale.square()).sqrt()).softmax(-1)[0, 0]
    assert abs(closed - probs.mean()) < 0.07


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_as_it_was_afterwards(family):
    model = causal(family)
    run_trunk(model, inputs(rows()), rows().chosen, training=True)
    assert "forward" not in vars(get_head(model))
    assert model(**inputs(rows())).logits.shape[-1] == 61


@pytest.mark.parametrize("distribution", [sculpt.Normal, sculpt.Laplace])
@pytest.mark.parametrize(("draws", "piece"), [(None, 2**24), (None, 300), (2, 2**24)])
def test_gradients_of_pieces_are_those_of_all_positions_at_once(distribution, draws, piece, monkeypatch):
    """Of the scale branch and of the hidden states, against torch's own operations on all logits."""
    monkeypatch.setattr(heads, "PIECE", piece)
    model = sculpt.Wrapper(distribution=distribution, initial_scale=0.8)(causal("llama"))
    batch, head = rows(), get_head(model)
    labels = batch.labels.flatten()[batch.chosen]
    hidden = run_trunk(model, inputs(batch), batch.chosen, training=True).hidden.detach().requires_grad_()
    branch = [*head.branch.parameters()]
    torch.manual_seed(3)
    fast = sum_sculpted_losses(heads.HeadInput(hidden, False), head, labels, distribution=distribution, draws=draws)
    fast_grads = torch.autograd.grad(0.3 * fast, [hidden, *branch])
    y, scale = head.leaf(hidden).float(), head.scale(hidden).float()
    if draws is None:
        std = distribution.std((y, scale))
        slow = F.cross_entropy(y / (1 + math.pi / 8 * std.square()).sqrt(), labels, reduction="sum")
    else:
        torch.manual_seed(3)
        drawn = [distribution.sample((y, scale)).log_softmax(-1).gather(-1, labels[:, None]) for _ in range(draws)]
        slow = -(torch.cat(drawn, -1).logsumexp(-1) - math.log(draws)).sum()
    assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert_close(fast_grads, torch.autograd.grad(0.3 * slow, [hidden, *branch]), rtol=1e-4, atol=1e-6)
