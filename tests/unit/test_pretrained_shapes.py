"""Models of Hugging Face of many kinds: a member is the voter alone, or an error names the layer that mixes members."""

import re

import pytest
import torch

from selfdoubt import vote
from selfdoubt.errors import SelfdoubtError

transformers = pytest.importorskip("transformers")

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {"vocab_size": 60, **_SMALL, "max_position_embeddings": 64}
_IMAGE = {**_SMALL, "image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
#: Kind of model, its settings, its inputs, and what an error says, where members are no rows.
MODELS = {
    "Bert": (_TEXT, "ids", None),
    "Roberta": (_TEXT, "ids", None),
    "Albert": (_TEXT | {"embedding_size": 16}, "ids", None),
    "Electra": (_TEXT | {"embedding_size": 16}, "ids", None),
    "MPNet": (_TEXT, "ids", "relative_attention_bias (reads|got)"),
    "DebertaV2": (
        _TEXT | {
            "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16,
            "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm",
        }, "ids", r"LayerNorm got \d+ lines|LayerNorm got several lines",
    ),
    "Longformer": (_TEXT | {"attention_window": 8}, "ids", r"attention.self.\w+ (reads?|got) "),
    "Mixtral": (_TEXT | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}, "ids", None),
    "Mamba": (
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "ids",
        "MambaMixer writes to a cache",
    ),
    "Bart": (
        {
            "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
        }, "ids", None,
    ),
    "ViT": (_IMAGE, "images", None),
    "Beit": (_IMAGE | {"use_relative_position_bias": True}, "images", None),
    "Swin": (_SWIN, "images", None),
    "Swinv2": (_SWIN, "images", None),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "images", None),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, "images", None),
    "Wav2Vec2": (
        _SMALL | {
            "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        }, "sound", None,
    ),
    "Perceiver": (
        {
            "num_latents": 16, "d_latents": 16, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
        }, "features", "PerceiverEmbeddings gets no tensor",
    ),
}  # fmt: skip


def make_inputs(kind, rows, length):
    if kind == "ids":
        return torch.randint(5, 60, (rows, length))
    shapes = {"images": (3, 32, 32), "sound": (400,), "features": (length, 32)}
    return torch.randn(rows, *shapes[kind])


def read_first(output):
    return output["last_hidden_state"]


@pytest.mark.parametrize("answer_from", ["base", "mean"])
@pytest.mark.parametrize(("rows", "length"), [(1, 16), (4, 16), (3, 9)])
@pytest.mark.parametrize("kind", MODELS)
def test_members_are_voters_alone_or_an_error_names_the_layer(kind, rows, length, answer_from):
    settings, inputs, says = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    x = make_inputs(inputs, rows, length)
    wrapped = vote.Wrapper(n_voters=3, answer_from=answer_from)(model)
    if says is None:
        members = read_first(wrapped.forecast(x)).members
        alone = read_first(vote.merge_voter(wrapped, 1)(x))
        torch.testing.assert_close(members[1], alone, atol=1e-5, rtol=1e-4)
        return
    with pytest.raises((SelfdoubtError, RuntimeError)) as error:
        wrapped.forecast(x)
    words = "\n".join((str(error.value), *getattr(error.value, "__notes__", ())))
    assert re.search(says, words), words


def test_a_state_space_model_has_voters_in_its_projections():
    config = transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    model, x = transformers.MambaModel(config).eval(), torch.randint(5, 60, (4, 16))
    inside = vote.Wrapper(n_voters=3, param_filter="in_proj|out_proj")(model)
    for wrapped, settings in ((inside, {}), (vote.Wrapper(n_voters=3)(model), {"use_cache": False})):
        members = read_first(wrapped.forecast(x, **settings)).members
        alone = read_first(vote.merge_voter(wrapped, 2)(x, **settings))
        torch.testing.assert_close(members[2], alone, atol=1e-5, rtol=1e-4)
