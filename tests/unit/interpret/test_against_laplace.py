"""Voters with the weights of other libraries' posteriors, and averages over their logits: laplace-torch, posteriors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from sklearn.datasets import load_diabetes, load_iris
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from selfdoubt import vote
from selfdoubt.forecast import Forecast
from selfdoubt.interpret import average_binary_noise, average_noise, class_probabilities
from selfdoubt.members import Wrapped
from tests import oracles


def scale(x: Any) -> Tensor:
    """Return columns of mean 0 and standard deviation 1."""
    columns = torch.tensor(x, dtype=torch.float32)
    return (columns - columns.mean(0)) / columns.std(0)


def train(x: Tensor, y: Tensor, loss: Any, outputs: int) -> nn.Module:
    """Return a small network, trained for 150 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 6), nn.Tanh(), nn.Linear(6, outputs))
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def fit(model: nn.Module, kind: str, x: Tensor, y: Tensor, subset: str, **options: Any) -> Any:
    """Return laplace-torch's posterior with a full covariance."""
    laplace = oracles.load("laplace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = laplace.Laplace(
            model, kind, subset_of_weights=subset, hessian_structure="full", prior_precision=1.0, **options
        )
        fitted.fit(DataLoader(TensorDataset(x, y), batch_size=64))
    return fitted


@pytest.fixture(scope="module")
def flowers() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = load_iris(return_X_y=True)
    inputs, classes = scale(x), torch.tensor(y)
    return train(inputs, classes, F.cross_entropy, 3), inputs, classes


@pytest.fixture(scope="module")
def posterior(flowers: tuple[nn.Module, Tensor, Tensor]) -> Any:
    return fit(flowers[0], "classification", *flowers[1:], "all")


def build_voters(model: nn.Module, samples: list[dict[str, Tensor]], output: Any) -> Wrapped:
    """Return the model with a voter for each of these sets of weights."""
    names = "|".join(f"^{name}$" for name in samples[0])
    wrapper = vote.Wrapper(n_voters=len(samples), rank=None, param_filter=names, output=output, answer_from="mean")
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped = wrapper(model)
    with torch.no_grad():
        for name in samples[0]:
            layer, _, kind = name.rpartition(".")
            deviations = wrapped.module.get_submodule(layer).deviations[kind]
            deviations.copy_(torch.stack([sample[name] for sample in samples]) - weights[name])
    return wrapped


def name_weights(model: nn.Module, vectors: Tensor, *, layer: str = "") -> list[dict[str, Tensor]]:
    """Return the weights in each row of ``vectors`` by their names, in the order of the model's parameters."""
    shapes = {name: p for name, p in model.named_parameters() if name.startswith(layer)}
    samples = []
    for vector in vectors:
        copies = {name: torch.empty_like(p) for name, p in shapes.items()}
        vector_to_parameters(vector, copies.values())
        samples.append(copies)
    return samples


def copy(model: nn.Module) -> nn.Module:
    """Return the same network again, as laplace-torch puts hooks into the one it is given."""
    weights = model.state_dict()
    fresh = nn.Sequential(nn.Linear(weights["0.weight"].shape[1], 6), nn.Tanh(), nn.Linear(6, len(weights["2.bias"])))
    fresh.load_state_dict(weights)
    return fresh


def test_voters_with_laplace_weights_predict_as_laplace_does(flowers, posterior):
    model, x, _ = flowers
    draw = torch.Generator().manual_seed(1)
    samples = posterior.sample(7, draw)
    voters = build_voters(copy(model), name_weights(model, samples), "logits")
    forecast = voters.forecast(x)
    theirs = posterior.functional_samples(x, pred_type="nn", n_samples=7, generator=draw.manual_seed(1))
    assert_close(forecast.members, theirs, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    assert_close(class_probabilities(forecast), posterior(x, pred_type="nn", link_approx="mc", n_samples=7),
                 rtol=1e-4, atol=1e-5)  # fmt: skip


def test_entropies_of_laplace_samples_against_scipy(flowers, posterior):
    draw = torch.Generator().manual_seed(2)
    probs = posterior.predictive_samples(flowers[1], pred_type="glm", n_samples=30, generator=draw)
    forecast = Forecast(probs.clamp_min(1e-30).log(), kind="logits")
    total, aleatoric = entropy(probs.mean(0).numpy(), axis=-1), entropy(probs.numpy(), axis=-1).mean(0)
    assert_close(forecast.total, torch.tensor(total), rtol=1e-4, atol=1e-5)
    assert_close(forecast.aleatoric, torch.tensor(aleatoric), rtol=1e-4, atol=1e-5)
    assert_close(forecast.epistemic, torch.tensor(total - aleatoric), rtol=1e-4, atol=1e-5)
    assert forecast.epistemic.max() > 0.02


def test_noise_on_logits_against_laplace_monte_carlo(flowers, posterior):
    # A mean of 20,000 draws is normal; one of 450 means is off by 7 of its standard errors with probability 1e-9.
    x, n = flowers[1], 20_000
    mean, covariance = posterior._glm_predictive_distribution(x)
    draw = torch.Generator().manual_seed(3)
    probs = posterior.predictive_samples(x, pred_type="glm", n_samples=n, diagonal_output=True, generator=draw)
    ours = average_noise(mean, covariance.diagonal(dim1=1, dim2=2).sqrt())
    error = probs.std(0) / n**0.5
    assert ((ours - probs.mean(0)).abs() < 7 * error + 1e-5).all()
    assert (mean.softmax(-1) - ours).abs().max() > 0.02  # the noise counts


def test_binary_noise_against_laplace_probit(posterior, monkeypatch):
    # With one logit that is 0 without noise, their probit approximation is MacKay's, up to 0.02 from the integral.
    logit = torch.linspace(-6, 6, 41)[:, None].expand(-1, 20).flatten()
    std = torch.linspace(0, 5, 20).repeat(41)
    mean = torch.stack([torch.zeros_like(logit), logit], -1)
    covariance = torch.stack([torch.zeros_like(std), std.square()], -1).diag_embed()
    monkeypatch.setattr(posterior, "_glm_predictive_distribution", lambda *_, **__: (mean, covariance))
    theirs = posterior(mean, pred_type="glm", link_approx="probit")[:, 1]
    assert_close(average_binary_noise(logit, std), theirs, rtol=0, atol=0.02)
    assert_close(average_noise(mean, covariance.diagonal(dim1=1, dim2=2).sqrt())[:, 1], theirs, rtol=0, atol=0.02)


def test_law_of_total_variance_against_laplace_regression():
    # The variance of 4,000 normal draws has a relative standard error of sqrt(2 / 4000) = 0.022, and its logarithm is
    # close to normal; one of 50 is off by 7 of them with probability 1e-10.
    x, y = load_diabetes(return_X_y=True)
    inputs, targets = scale(x), scale(y)[:, None]
    model = train(inputs, targets, F.mse_loss, 1)
    fitted, new = fit(model, "regression", inputs, targets, "last_layer", sigma_noise=0.7), inputs[:50]
    samples = fitted.sample(4000, torch.Generator().manual_seed(4))
    forecast = build_voters(copy(model), name_weights(model, samples, layer="2."), "values").forecast(new)
    mean, variance = fitted(new)
    epistemic = variance.squeeze(-1)
    tolerance = 7 * (2 / 4000) ** 0.5
    assert_close(forecast.epistemic.square().log(), epistemic.log(), rtol=0, atol=tolerance)
    assert ((forecast.mean - mean).abs() < 7 * (epistemic / 4000).sqrt()).all()
    noise = torch.full((4000, 50, 1), 0.7)
    both = Forecast(forecast.members, scale_std=noise)
    assert_close(both.total.square(), epistemic + 0.7**2, rtol=tolerance, atol=0)
    assert_close(both.aleatoric, noise[0])
    torch.manual_seed(5)
    theirs, spread = fitted(new, pred_type="nn", link_approx="mc", n_samples=9)
    torch.manual_seed(5)
    samples = fitted.sample(9)
    few = build_voters(copy(model), name_weights(model, samples, layer="2."), "values").forecast(new)
    assert_close(few.mean, theirs, rtol=1e-4, atol=1e-5)
    assert_close(few.std.square() * 9 / 8, spread, rtol=1e-3, atol=1e-6)


def test_voters_with_weights_of_posteriors_predict_as_each_network_does(flowers):
    module = oracles.load_alone("posteriors.laplace.diag_fisher")
    model, x, y = flowers
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def find_log_posterior(parameters: Any, batch: Any) -> Any:
        logits = functional_call(model, parameters, batch[0])
        return -F.cross_entropy(logits, batch[1], reduction="none"), logits

    transform = module.build(find_log_posterior, per_sample=True, init_prec_diag=1.0)
    state, _ = transform.update(transform.init(weights), (x, y))
    torch.manual_seed(6)
    drawn = module.sample(state, torch.Size([5]))
    samples = [{name: drawn[name][m] for name in weights} for m in range(5)]
    forecast = build_voters(copy(model), samples, "logits").forecast(x)
    expected = torch.stack([functional_call(model, sample, x) for sample in samples]).detach()
    assert_close(forecast.members, expected, rtol=1e-4, atol=1e-4)
    assert_close(class_probabilities(forecast), expected.softmax(-1).mean(0), rtol=1e-4, atol=1e-5)
    assert forecast.epistemic.mean() > 1e-3
