"""Which leaves a regex picks, and what it says when it picks none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from selfdoubt import targets
from selfdoubt.compat import get_base_layer
from selfdoubt.errors import ConfigError, TargetError
from tests.zoo import FAMILIES, causal, mlp


def names(model, pattern=None):
    return {leaf.name: leaf.params for leaf in targets.find_leaves(model, pattern)}


def test_leaves_come_in_the_models_order_with_their_matched_parameters():
    assert names(mlp(), ".") == {"0": ("weight", "bias"), "2": ("weight", "bias")}
    assert names(mlp(), "bias") == {"0": ("bias",), "2": ("bias",)}
    assert names(mlp(), r"^2\.w") == {"2": ("weight",)}


def test_leaves_are_modules_of_the_model_itself():
    model = mlp()
    (leaf,) = targets.find_leaves(model, "^2")
    assert leaf.module is model[2]


@pytest.mark.parametrize(
    ("family", "expected"),
    {
        "llama": {"q_proj", "v_proj"},
        "mistral": {"q_proj", "v_proj"},
        "qwen2": {"q_proj", "v_proj"},
        "qwen3": {"q_proj", "v_proj"},
        "gemma2": {"q_proj", "v_proj"},
        "phi3": {"qkv_proj"},
        "gpt2": {"c_attn"},
        "gpt_neox": {"query_key_value"},
        "opt": {"q_proj", "v_proj"},
    }.items(),
)
def test_a_decoder_gets_deviations_on_query_and_value(family, expected):
    found = names(causal(family))
    assert {name.rpartition(".")[2] for name in found} == expected
    assert len(found) == 2 * len(expected)  # two layers


def test_every_family_of_the_ladder_is_in_the_table_above():
    assert len(FAMILIES) == 9


def test_a_model_that_is_no_decoder_gets_everything():
    assert targets.choose_default_filter(mlp()) == targets.EVERYTHING
    no_attention = nn.ModuleDict({"q_proj": nn.Linear(1, 1)})
    assert targets.choose_default_filter(no_attention) == targets.EVERYTHING


def test_tied_parameters_keep_all_their_names():
    tied = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert names(tied, "head") == {"head": ("weight",)}
    assert set(names(tied, ".")) == {"embed", "head"}


def test_modules_whose_parts_cannot_be_replaced_are_one_leaf():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "normed": weight_norm(nn.Linear(2, 2))})
    found = names(model, ".")
    assert set(found) == {"attention", "normed"}
    assert "out_proj.weight" in found["attention"]
    assert "parametrizations.weight.original0" in found["normed"]


def test_the_layer_inside_adapters():
    inner, outer, outermost = nn.Linear(1, 1), nn.Module(), nn.Module()
    outer.base_layer, outermost.base_layer = inner, outer
    assert get_base_layer(outermost) is inner
    assert get_base_layer(inner) is inner


def test_replace_puts_a_module_into_its_place():
    model = nn.Sequential(mlp())
    targets.replace_module(model, "0.2", nn.Identity())
    assert isinstance(model[0][2], nn.Identity)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_regex_that_hits_nothing_names_the_nearest_parameters():
    with pytest.raises(TargetError) as error:
        targets.find_leaves(causal("llama"), "q_porj|w_proj")
    text = one_line(error)
    assert "'q_porj|w_proj'" in text
    assert "none of the 21 parameters" in text
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert "try param_filter='" in text


def test_the_filter_that_is_proposed_hits_something():
    for wanted in ("q_porj", "Embed", "fc1", "norn"):
        with pytest.raises(TargetError) as error:
            targets.find_leaves(causal("llama"), wanted)
        proposed = str(error.value).rpartition("param_filter=")[2].strip("'")
        assert targets.find_leaves(causal("llama"), proposed)


def test_a_model_without_parameters_says_so():
    with pytest.raises(TargetError) as error:
        targets.find_leaves(nn.ReLU(), None)
    assert "has no parameters" in one_line(error)


def test_a_broken_regex():
    with pytest.raises(ConfigError) as error:
        targets.find_leaves(mlp(), "(")
    assert "got '('" in one_line(error)


def test_a_parameter_of_the_model_itself_says_how_to_wrap_it():
    with pytest.raises(TargetError) as error:
        targets.find_leaves(nn.Linear(2, 2), None)
    assert "nn.Sequential(model)" in one_line(error)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.body = mlp()

    assert set(names(Scaled(), "body")) == {"body.0", "body.2"}
    with pytest.raises(TargetError, match=r"'scale', which belongs to the model itself"):
        targets.find_leaves(Scaled(), ".")
