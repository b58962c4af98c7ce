"""Density: distances of features, with any module, within other wrappers, and stored."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import selfdoubt
from selfdoubt import density, sample, sculpt, vote
from selfdoubt.errors import BaseMismatchError, ConfigError, DataError, ShapeError, WrapError
from selfdoubt.noise_fit import fit_noise
from selfdoubt.storage import from_json, to_json
from tests import oracles
from tests.zoo import FAMILIES, causal, encoder, mlp, prompts


def inputs(n: int = 64, width: int = 4, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, width, generator=generator, dtype=torch.float64)


@cache
def network() -> nn.Module:
    """The model that is wrapped; wrapping leaves it as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp()


def fitted(background: bool = False, **settings) -> nn.Module:
    wrapped = density.Wrapper(**settings)(network())
    density.fit(wrapped, [inputs(), inputs(seed=1)], [inputs(seed=2, scale=5.0)] if background else None)
    return wrapped


class Twice(nn.Module):
    """A model that calls its head twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.head(x).tanh())


def hidden(x: torch.Tensor) -> torch.Tensor:
    return network()[:-1](x).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_language_model_is_measured(family):
    (name,) = density.Wrapper()(causal(family)).leaf_names
    assert causal(family).get_submodule(name) is causal(family).get_output_embeddings()


def test_outputs_stay_those_of_the_model_to_the_bit():
    x = inputs(5)
    wrapped = fitted()
    y, risk = wrapped(x, return_risk=True)
    assert torch.equal(y, network()(x))
    assert risk.shape == (5,)
    assert not any(p.requires_grad for p in wrapped.parameters())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # theirs
def test_distances_against_lm_polygraph():
    known = {
        "train_embeddings_decoder": torch.cat([hidden(inputs()), hidden(inputs(seed=1))]).float().numpy(),
        "background_train_embeddings_decoder": hidden(inputs(seed=2, scale=5.0)).float().numpy(),
        "embeddings_decoder": hidden(inputs(9, seed=3)).float().numpy(),
    }
    plain = oracles.load_estimator("mahalanobis_distance").MahalanobisDistanceSeq()(known)
    module = oracles.load_estimator("relative_mahalanobis_distance")
    relative = module.RelativeMahalanobisDistanceSeq()(known)
    x = inputs(9, seed=3)
    for expected, background in ((plain, False), (relative, True)):
        _, risk = fitted(background=background, shrinkage=0.0)(x, return_risk=True)
        assert_close(risk.float(), torch.from_numpy(np.asarray(expected)), rtol=1e-3, atol=1e-3)


def test_labels_of_a_loader_are_not_taken_for_inputs():
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x, mask=None):
            return self.layers(x if mask is None else x * mask)

    labelled = [(inputs(64), torch.ones(64, 1))]
    for model in (Masks(), mlp()):
        wrapped = density.Wrapper()(model)
        with pytest.raises(
            DataError, match=r"^a batch has 2 entries, .* requires 1 \((x|input)\); leave labels out, and"
        ):
            density.fit(wrapped, labelled)
        with pytest.raises(DataError, match=r"^a batch has 2 entries"):
            fit_noise(vote.Wrapper(weight_noise="auto")(model), labelled)
        density.fit(wrapped, [(x,) for x, _ in labelled])
        once = wrapped.predict(inputs()).risk
        density.fit(wrapped, [{"x" if isinstance(model, Masks) else "input": x} for x, _ in labelled])
        assert torch.equal(wrapped.predict(inputs()).risk, once)


class Open(nn.Module):
    """Takes any inputs, as wrappers around a model do."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, *args, **kwargs):
        return self.layers(*args, **kwargs)


def test_labels_are_found_where_a_model_takes_any_inputs():
    batch = (inputs(64), torch.ones(64, dtype=torch.long))
    with pytest.raises(
        DataError, match=r"^a batch has 2 entries, and the last looks like labels, 64 whole numbers; le"
    ):
        density.fit(density.Wrapper()(Open()), [batch])
    density.fit(density.Wrapper()(Open()), [batch[:1]])
    density.fit(density.Wrapper()(Open()), [{"input": batch[0]}])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_labels_are_found_in_a_model_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(causal("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    ids = torch.tensor(prompts(3))
    wrapped = density.Wrapper()(model)
    with pytest.raises(DataError, match=r"^a batch has 2 entries, .* leave labels out"):
        density.fit(wrapped, [(ids, torch.ones_like(ids))])
    density.fit(wrapped, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (torch.ones(3, 4), r"batches must be .*, got Tensor; give a list of batches, e\.g\. \[x\]$"),
        ({"input": torch.ones(3, 4)}, r"batches must be .*, got dict; give a list of batches"),
        ("rows", "batches must be .*, got str$"),
        ([], "the loader gave no batches"),
        ([{"y": torch.ones(3, 4)}], "a batch has 'y', which the model does not know; the model's inputs are input$"),
        ([{}], "a batch has no 'input'; the model's inputs are input$"),
    ],
)
def test_what_gives_no_batches_is_said(loader, says):
    with pytest.raises(DataError, match=f"^{says}"):
        density.fit(density.Wrapper()(mlp()), loader)
    with pytest.raises(DataError, match=f"^{says}"):
        fit_noise(vote.Wrapper(weight_noise="auto")(mlp()), loader)


def test_one_row_without_a_batch_is_refused():
    with pytest.raises(
        ShapeError, match=r"^density measures features of shape \(batch, \.\.\., width\), got \(\d+,\);"
    ):
        fitted().predict(inputs()[0])


def test_far_inputs_have_a_larger_risk():
    wrapped = fitted()
    near, far = (wrapped(inputs(50, seed=5, scale=s), return_risk=True)[1] for s in (1.0, 10.0))
    assert far.median() > 2 * near.max()


@pytest.mark.parametrize(
    ("model", "x", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 3)), torch.randn(40, 4), (40,)),
        (nn.Sequential(nn.Linear(4, 3)), torch.randn(40, 5, 4), (40, 5)),
        (nn.Sequential(Conv1D(6, 4)), torch.randn(40, 5, 4), (40, 5)),
        (nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(40, 4, 9), (40, 9)),
        (nn.Sequential(nn.Conv2d(3, 6, 3, stride=2)), torch.randn(40, 3, 7, 8), (40, 7, 8)),
    ],
    ids=["linear", "positions", "hf-conv1d", "conv1d", "conv2d"],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_there_is_a_distance_for_each_item_and_position(model, x, shape, pooled):
    wrapped = density.Wrapper(pooled=pooled)(model)
    density.fit(wrapped, [x])
    y, risk = wrapped(x, return_risk=True)
    assert torch.equal(y, model(x))
    assert risk.shape == (shape[:1] if pooled else shape)


def test_a_norm_inside_can_be_measured():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double()
    wrapped = density.Wrapper(param_filter=r"^1\.")(model)
    density.fit(wrapped, [inputs()])
    _, risk = wrapped(inputs(3), return_risk=True)
    again = density.Wrapper()(nn.Sequential(model[0], nn.Linear(8, 1).double()))  # the same features enter its head
    density.fit(again, [inputs()])
    assert_close(risk, again(inputs(3), return_risk=True)[1])


@pytest.mark.parametrize("pooled", [False, True])
def test_padding_does_not_count(pooled):
    model = causal("llama")
    ids = torch.randint(3, 60, (32, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(32, 3, dtype=torch.long)], 1)
    mask = (torch.arange(10) < 7).long().expand(32, 10)
    plain, masked = (density.Wrapper(pooled=pooled)(model) for _ in range(2))
    density.fit(plain, [{"input_ids": ids}])
    density.fit(masked, [{"input_ids": padded, "attention_mask": mask}])
    _, expected = plain(input_ids=ids, return_risk=True)
    _, risk = masked(input_ids=padded, attention_mask=mask, return_risk=True)
    assert_close(risk["logits"] if pooled else risk["logits"][:, :7], expected["logits"], rtol=1e-4, atol=1e-4)


def test_the_risk_has_the_outputs_structure():
    ids = torch.randint(3, 60, (32, 7), generator=torch.Generator().manual_seed(0))
    wrapped = density.Wrapper()(causal("llama"))
    density.fit(wrapped, [{"input_ids": ids}])
    y, risk = wrapped(input_ids=ids, output_hidden_states=True, return_risk=True)
    assert type(risk) is type(y)
    assert risk["logits"].shape == (32, 7)
    assert set(risk) <= {"logits", "hidden_states"}  # a cache has no risk


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_classifiers_of_texts_and_images(kind):
    x = torch.randint(3, 60, (40, 6)) if kind == "bert" else torch.randn(40, 3, 8, 8, dtype=torch.float64)
    wrapped = density.Wrapper()(encoder(kind))
    density.fit(wrapped, [(x,)])
    assert wrapped(x, return_risk=True)[1]["logits"].shape == (40,)


def test_a_density_that_is_not_fitted_says_so():
    with pytest.raises(ConfigError, match=r"no statistics yet; fit it .* density.fit\(wrapped, loader\)"):
        density.Wrapper()(network())(inputs(3), return_risk=True)


@pytest.mark.parametrize("outer", [vote.Wrapper(n_voters=2, weight_noise=0.0), sample.Wrapper(n_samples=2)])
def test_within_members_the_features_of_all_are_there(outer):
    inside = fitted()
    wrapped = outer(inside).eval()
    x = inputs(5)
    wrapped(x, return_risk=True)
    leaf = density.find_measured_leaf(wrapped)
    assert leaf.read_features().shape == (15, 8)
    if isinstance(outer, vote.Wrapper):
        assert_close(leaf.measure(leaf.read_features()), inside(x, return_risk=True)[1].repeat(3))


@pytest.mark.parametrize("settings", [{}, {"param_filter": r"\b0\."}], ids=["all", "below"])
def test_a_density_goes_beneath_members_that_are_there(settings):
    voters = vote.Wrapper(n_voters=3, weight_noise=0.5, **settings)(network()).eval()
    x = inputs(5)
    before = voters(x, return_risk=True)
    measured = density.insert(density.Wrapper(), voters)
    density.fit(measured, [inputs(), inputs(seed=1)])
    for new, old, untouched in zip(measured(x, return_risk=True), before, voters(x, return_risk=True), strict=True):
        assert torch.equal(new, old)
        assert torch.equal(untouched, old)
    rebuilt = voters.spec(fitted()).eval()
    rebuilt.load_state_dict(measured.state_dict(), strict=True)
    assert torch.equal(rebuilt(x, return_risk=True)[1], before[1])
    assert density.find_measured_leaf(voters) is None


def test_a_density_beneath_members_is_refused_where_their_filter_reads_the_beginning_of_names():
    with pytest.raises(WrapError, match="which a density beneath changes; wrap the model with density first"):
        density.insert(density.Wrapper(), vote.Wrapper(param_filter=r"^0\.")(network()))


def test_a_density_goes_between_voters_and_sculpt(tmp_path):
    voters = vote.Wrapper(n_voters=2, weight_noise=0.5)(sculpt.Wrapper()(network())).eval()
    measured = density.insert(density.Wrapper(), voters)
    density.fit(measured, [inputs(), inputs(seed=1)])
    selfdoubt.save(measured, tmp_path)
    loaded = selfdoubt.load(tmp_path, network()).eval()
    x = inputs(5)
    for after, before in zip(loaded(x, return_risk=True), voters(x, return_risk=True), strict=True):
        assert torch.equal(after, before)


def test_a_sculpt_inside_keeps_its_head():
    wrapped = density.Wrapper()(sculpt.Wrapper()(network()))
    density.fit(wrapped, [inputs(), inputs(seed=1)])
    x = inputs(3)
    assert_close(wrapped(x, return_risk=True)[1], fitted()(x, return_risk=True)[1])


@pytest.mark.parametrize("settings", [{}, {"rank": 3}, {"pooled": True, "shrinkage": 0.2}])
@pytest.mark.parametrize("background", [False, True])
def test_a_saved_density_gives_the_same_numbers(tmp_path, settings, background):
    wrapped = fitted(background=background, **settings)
    selfdoubt.save(wrapped, tmp_path)
    loaded = selfdoubt.load(tmp_path, network())
    x = inputs(5)
    assert loaded.spec == wrapped.spec
    assert torch.equal(loaded(x, return_risk=True)[1], wrapped(x, return_risk=True)[1])
    fresh = density.Wrapper(**settings)(network())
    fresh.load_state_dict(wrapped.state_dict(), strict=True)
    assert torch.equal(fresh(x, return_risk=True)[1], wrapped(x, return_risk=True)[1])


def test_a_density_of_another_width_is_refused(tmp_path):
    selfdoubt.save(fitted(), tmp_path)
    with pytest.raises(BaseMismatchError, match="another base model"):
        selfdoubt.load(tmp_path, mlp(4, 9, 3))


def test_fitting_again_forgets_the_background():
    wrapped = fitted(background=True)
    density.fit(wrapped, [inputs(), inputs(seed=1)])
    x = inputs(3)
    assert torch.equal(wrapped(x, return_risk=True)[1], fitted()(x, return_risk=True)[1])


def test_fitting_leaves_modes_and_gradients_as_they_were():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()
    wrapped = density.Wrapper()(model).train()
    wrapped.module[0].eval()
    density.fit(wrapped, [inputs()])
    assert [m.training for m in wrapped.module.children()] == [False, True, True]
    again = density.Wrapper()(copy.deepcopy(model).eval())
    density.fit(again, [inputs()])
    assert torch.equal(density.find_measured_leaf(wrapped).usual.mean, density.find_measured_leaf(again).usual.mean)


def test_settings_go_to_json_and_back():
    spec = density.Wrapper(param_filter="head", pooled=True, rank=3, shrinkage=0.1)
    assert from_json(to_json(spec)) == spec
    assert spec == eval(repr(spec), {"Wrapper": density.Wrapper})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank"), ({"shrinkage": 1.5}, "shrinkage"), ({"param_filter": "("}, "regular")],
)  # fmt: skip
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        density.Wrapper(**settings)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(WrapError, match="one layer, got 2"):
        density.Wrapper(param_filter=".*")(network())
    with pytest.raises(WrapError, match="is Embedding"):
        density.Wrapper(param_filter="embed_tokens")(causal("llama"))
    with pytest.raises(WrapError, match="has a density already"):
        density.Wrapper()(density.Wrapper()(network()))
    twice = nn.RNNCell(4, 4)  # owns its weights itself
    with pytest.raises(WrapError, match="no linear or convolution layer"):
        density.Wrapper()(nn.Sequential(twice))
    with pytest.raises(WrapError, match="called 2 times"):
        density.fit(density.Wrapper()(Twice()), [inputs()])
    with pytest.raises(ConfigError, match="no density to fit"):
        density.fit(network(), [inputs()])
    with pytest.raises(DataError, match="gave no batches"):
        density.fit(density.Wrapper()(network()), [])


def test_a_class_of_models_can_be_decorated():
    @density.Wrapper(shrinkage=0.1)
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x)

    wrapped = Model()
    density.fit(wrapped, [torch.randn(50, 4)])
    assert wrapped(torch.randn(3, 4), return_risk=True)[1].shape == (3,)


def test_by_default_a_classifier_of_three_layers_is_measured_before_its_last_but_one():
    three = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert density.Wrapper()(three).leaf_names == ["2"]
    assert density.Wrapper()(sculpt.Wrapper()(three)).leaf_names[0].endswith("2")
    assert density.Wrapper()(network()).leaf_names == ["2"]  # of two layers the first reads the input itself
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert density.Wrapper()(convolutions).leaf_names == ["3"]
