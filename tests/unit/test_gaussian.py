"""Streaming Gaussians: against scipy, scikit-learn and lm-polygraph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance, ledoit_wolf
from sklearn.decomposition import PCA
from torch.multiprocessing.spawn import start_processes
from torch.testing import assert_close

from selfdoubt.errors import DataError, NonFiniteError
from selfdoubt.gaussian import Gaussian, Moments, merge
from tests import oracles


def features(n: int = 200, width: int = 7, seed: int = 0, offset: float = 3.0) -> torch.Tensor:
    """Correlated features of very different variances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * scales @ mix + offset


def fitted(x: torch.Tensor, shrinkage: float | None = 0.0, rank: int | None = None) -> Gaussian:
    gaussian = Gaussian(x.shape[1], rank)
    gaussian.fit(Moments.sum(x), shrinkage)
    return gaussian


def test_distances_against_scipy():
    x, new = features(), features(20, seed=1)
    inverse = np.linalg.inv(np.cov(x.numpy().T))
    expected = [mahalanobis(row, x.mean(0).numpy(), inverse) for row in new.numpy()]
    assert_close(fitted(x)(new), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_mean_and_covariance_against_scikit_learn():
    x = features()
    oracle = EmpiricalCovariance().fit(x.numpy())
    moments = Moments.sum(x)
    assert_close(moments.mean, torch.from_numpy(oracle.location_))
    assert_close(moments.compute_covariance(), torch.from_numpy(oracle.covariance_) * 200 / 199)
    squared = torch.from_numpy(oracle.mahalanobis(x.numpy())) * 199 / 200
    assert_close(fitted(x)(x).square(), squared, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "width"), [(200, 7), (12, 30), (30, 30), (3, 2)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_shrinkage_against_scikit_learn(n, width, offset):
    x = features(n, width, offset=offset)
    covariance, share = ledoit_wolf(x.numpy())
    moments = Moments.sum(x)
    assert moments.compute_shrinkage() == pytest.approx(share, abs=1e-7)
    assert_close(moments.compute_covariance(None), torch.from_numpy(covariance) * n / (n - 1), rtol=1e-6, atol=1e-9)


def test_a_low_rank_is_probabilistic_principal_components():
    x, new = features(500, 8), features(20, 8, seed=1)
    oracle = PCA(n_components=3).fit(x.numpy())
    inverse = np.linalg.inv(oracle.get_covariance())
    expected = [mahalanobis(row, oracle.mean_, inverse) for row in new.numpy()]
    assert_close(fitted(x, rank=3)(new), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert fitted(x, rank=3).whitening.shape == (3, 8)


@pytest.mark.parametrize("rank", [8, 9, 100])
def test_a_rank_of_the_width_or_more_keeps_everything(rank):
    x = features(500, 8)
    assert torch.equal(fitted(x, rank=rank)(x), fitted(x)(x))


def test_distances_against_lm_polygraph():
    module = oracles.load_estimator("mahalanobis_distance")
    x, new = features().float(), features(20, seed=1).float()
    inverse, _ = module.compute_inv_covariance(x.mean(0)[None], x)
    expected = module.mahalanobis_distance_with_known_centroids_sigma_inv(x.mean(0)[None], None, inverse, new)
    assert_close(fitted(x)(new), expected[:, 0], rtol=1e-3, atol=1e-3)


def test_float32_features_give_the_distances_of_float64_ones():
    x, new = features(), features(50, seed=1)
    exact, rounded = fitted(x)(new), fitted(x.float())(new.float())
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


def test_bfloat16_features_are_measured_in_float32():
    x = features().bfloat16()
    assert torch.equal(fitted(x)(x), fitted(x.float())(x.float()))


def test_statistics_stay_in_float32_when_a_model_is_cast():
    gaussian = fitted(features())
    before = gaussian.whitening.clone()
    gaussian.to(torch.bfloat16)
    assert gaussian.whitening.dtype == torch.float32
    assert torch.equal(gaussian.whitening, before)


@pytest.mark.parametrize(("x", "shrinkage"), [(features(5, 7), 0.0), (torch.ones(50, 3), None)], ids=["few", "same"])
def test_a_singular_covariance_is_an_error(x, shrinkage):
    with pytest.raises(DataError, match="has no inverse; give more data, or a larger shrinkage"):
        fitted(x, shrinkage)


def test_one_feature_has_no_covariance():
    with pytest.raises(DataError, match="at least two features, got 1"):
        fitted(features(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error(value):
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        Moments.sum(torch.tensor([[1.0, value]]))


def test_moments_of_pieces_add_up():
    x = features(31)
    together, apart = Moments.sum(x), merge(Moments.sum(x[:10]), Moments.sum(x[10:]))
    for name in ("count", "total", "products", "cubes", "quartics"):
        assert_close(getattr(apart.move(together.origin), name), getattr(together, name), rtol=1e-7, atol=1e-7)
    assert together.reduce() is together  # one process


def _reduce(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    moments = Moments.sum(features(31)[rank * 10 : 10 + rank * 21]).reduce()
    torch.save(vars(moments), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_get_the_moments_of_all(tmp_path):
    start_processes(_reduce, args=(str(tmp_path),), nprocs=2, start_method="fork")
    together = Moments.sum(features(31))
    for rank in range(2):
        moments = Moments(**torch.load(tmp_path / f"{rank}.pt"))
        assert_close(moments.mean, together.mean)
        assert_close(moments.compute_covariance(None), together.compute_covariance(None))
