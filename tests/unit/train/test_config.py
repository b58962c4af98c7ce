"""Settings that contradict each other are said in one line, and a file means what it says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import ConfigError
from selfdoubt.train.config import TrainConfig, load_config
from selfdoubt.train.wrapper_settings import WrapperFlags

HERE = {"data": "data.json", "out": "out"}


def config(**settings):
    return TrainConfig(**HERE | settings)


def test_the_tutorials_settings_are_the_defaults():
    c = config()
    assert c.wrapper is None  # LoRA alone; the tutorial's voters are a flag away
    assert load_config(None, HERE | {"n_voters": 3}).wrapper == vote.Wrapper(
        n_voters=3, weight_noise=0.2, alpha=1.0, rank=16
    )
    assert (c.lora_r, c.lora_alpha, c.lora_dropout) == (64, 64.0, 0.0)
    assert (c.lr, c.epochs, c.clip, c.precision, c.max_length, c.val_every) == (2e-4, 5, 1.0, "bf16-mixed", 400, 0.25)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"n_voters": 0}, "n_voters must be a whole number from 1 to 1000000, found 0"),
        (
            {"wrapper": "sample", "noise": 1.0},
            "distribution.p must be a finite number above 0 and below 1, or 'auto', found 1.0",
        ),
        ({"wrapper": "sculpt:depth=3"}, "the key 'depth'"),
        ({"wrapper": "vote:rank"}, "settings look like n_voters=5,rank=8, got 'rank'"),
        ({"wrapper": "vote:compile=true"}, "leave compile out"),
        ({"wrapper": "vote:symbolic_trace=true"}, "leave compile out"),
        ({"wrapper": "vote", "batch_size": 10}, "use batch_size=12, or voter_batch='repeat'"),
        ({"wrapper": "guess"}, "--wrapper must be none, vote, sample, sculpt, density, got 'guess'"),
        ({"lr": 2}, "lr must be between 0 and 1"),
        ({"lr": float("nan")}, "lr must be float, got nan"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"val_share": 1}, "val_share must be"),
        ({"val_every": 0}, "val_every is a share"),
        ({"quantize": "nf4", "rank": 0}, "use a rank"),
        ({"quantize": "int3"}, "quantize must be"),
        ({"merge": True, "wrapper": "vote"}, "voters cannot be merged"),
        ({"merge": True, "wrapper": "none", "quantize": "nf4"}, "cannot be merged into 4-bit"),
        ({"loggers": "csv,mlflow"}, "loggers must be csv, tensorboard, wandb or none, got mlflow"),
        ({"limit": 1}, "limit must be at least 2"),
        ({"batch_size": "all"}, "batch_size must be int or 'auto', got 'all'"),
        ({"pad_to": 0}, "pad_to must be at least 1, got 0"),
        ({"compile": True, "strategy": "fsdp"}, "compiled layers cannot be sharded by fsdp"),
    ],
)
def test_a_bad_setting_is_one_line(settings, wanted):
    with pytest.raises(ConfigError) as raised:
        load_config(None, HERE | settings)
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrapper_is_one_of_the_three():
    with pytest.raises(ConfigError, match=r"^wrapper must be vote\.Wrapper\(\.\.\.\), .*, got 'vote'$"):
        config(wrapper="vote")
    with pytest.raises(ConfigError, match=r"^training runs .*; leave compile out$"):
        config(wrapper=sample.Wrapper(compile=True))


WRAPPERS = [
    None,
    vote.Wrapper(n_voters=2, rank=None, param_filter=r"layers\.(0|1)", shared_inputs=("mask", "ids"), seed=3),
    vote.Wrapper(n_voters=6, rank=4, alpha=2.0, verbose=1),
    vote.Wrapper(finetune=False),
    sample.Wrapper(n_samples=7, distribution=sample.Normal(0.25, trainable=True), output="logits"),
    sample.Wrapper(distribution=sample.Bernoulli(0.3)),
    sculpt.Wrapper(distribution=sculpt.Laplace, n_layers=1, rank=None, initial_scale=0.5),
    sculpt.Wrapper(rank=3, n_layers=4),
]


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=repr)
def test_every_setting_is_read_back_from_toml(tmp_path, wrapper):
    chosen = config(data='a "quoted"\\path\n.json', lr=1e-5, limit=7, wrapper=wrapper, pack=True, voter_batch="repeat")
    (tmp_path / "c.toml").write_text(chosen.to_toml())
    assert load_config(tmp_path / "c.toml", {}) == chosen


def test_a_flag_wins_over_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('data = "a"\nout = "b"\nlr = 0.001\n')
    assert load_config(tmp_path / "c.toml", {"out": "c"}) == config(data="a", out="c", lr=1e-3)


@pytest.mark.parametrize(
    ("flags", "wrapper"),
    [
        ({}, vote.Wrapper(n_voters=4, rank=8)),
        ({"n_voters": 2}, vote.Wrapper(n_voters=2, rank=8)),
        ({"rank": 0}, vote.Wrapper(n_voters=4)),
        ({"wrapper": "vote"}, vote.Wrapper(n_voters=4, rank=8)),
        ({"wrapper": "vote:rank=2"}, vote.Wrapper(n_voters=4, rank=2)),
        ({"wrapper": "vote:rank=2", "rank": 3}, vote.Wrapper(n_voters=4, rank=3)),
        ({"seed": 5}, vote.Wrapper(n_voters=4, rank=8, seed=5)),
        ({"wrapper": "none"}, None),
        ({"wrapper": "sample", "n_samples": 2, "noise": 0.3}, sample.Wrapper(2, sample.Bernoulli(0.3))),
        ({"wrapper": "sample:distribution=Normal(0.2, trainable=true)"}, sample.Wrapper(5, sample.Normal(0.2, True))),
        ({"wrapper": "sample:distribution=Normal"}, sample.Wrapper(5, sample.Normal())),
        ({"wrapper": "sculpt:distribution=Laplace,rank=8", "n_layers": 3}, sculpt.Wrapper(sculpt.Laplace, 3, 8)),
    ],
    ids=repr,
)
def test_flags_of_a_wrapper_win_over_its_table(tmp_path, flags, wrapper):
    (tmp_path / "c.toml").write_text('[wrapper]\nmethod = "vote"\nn_voters = 4\nrank = 8\n')
    assert load_config(tmp_path / "c.toml", HERE | flags).wrapper == wrapper


@pytest.mark.parametrize(
    ("name", "wrapper", "batch"),
    [
        ("vote", vote.Wrapper(2, r"layers\.1", None, weight_noise=0.5, seed=4), "repeat"),
        ("sample", sample.Wrapper(6, sample.Bernoulli(0.2), r"layers\.1", seed=4), "repeat"),
        ("sculpt", sculpt.Wrapper(n_layers=3, seed=4), "repeat"),
        ("none", None, "repeat"),
    ],
)
def test_a_file_of_an_earlier_version_has_all_wrappers_settings_side_by_side(tmp_path, name, wrapper, batch):
    (tmp_path / "c.toml").write_text(
        f'data = "a"\nout = "b"\nwrapper = "{name}"\nn_voters = 2\nrank = 0\nweight_noise = 0.5\nalpha = 1.0\n'
        'param_filter = "layers\\\\.1"\nvoters_see = "all"\nn_samples = 6\nnoise = 0.2\nn_layers = 3\nseed = 4\n'
    )
    read = load_config(tmp_path / "c.toml", {})
    assert read == config(data="a", out="b", wrapper=wrapper, voter_batch=batch, seed=4)


def test_flags_of_wrappers_are_settings_of_wrappers():
    """Types and defaults are repeated there, because torch is not imported to list flags."""
    specs: dict[str, Any] = {"vote": vote.Wrapper(rank=16), "sample": sample.Wrapper(), "sculpt": sculpt.Wrapper()}
    for flag in fields(WrapperFlags):
        for method in flag.metadata["help"].partition(":")[0].split(", ") if flag.name != "wrapper" else ():
            default = getattr(specs[method], flag.name) if flag.name != "noise" else None  # the wrapper's own noise
            assert flag.default == default
            assert type(flag.default).__name__ in flag.type or repr(flag.default) in flag.type
            chosen = load_config(None, HERE | {"wrapper": method, flag.name: flag.default})
            assert chosen.wrapper == specs[method]


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ({}, "none"),
        ({"rank": 4}, "vote"),
        ({"alpha": 0.5}, "vote"),
        ({"n_samples": 2}, "sample"),
        ({"n_layers": 1}, "sculpt"),
    ],
)
def test_a_flag_of_a_wrapper_means_that_wrapper(flags, method):
    assert load_config(None, HERE | flags).method == method
    assert load_config(None, HERE | flags | {"wrapper": "none"}).method == "none"


@pytest.mark.parametrize(
    ("wrapper", "batch", "per_row", "groups"),
    [
        (vote.Wrapper(3), "split", 1, 3),
        (vote.Wrapper(3), "repeat", 3, 1),
        (sample.Wrapper(4), "split", 1, 1),
        (sample.Wrapper(4), "repeat", 1, 1),
        (None, "split", 1, 1),
    ],
)
def test_voters_read_their_own_share_or_every_row(wrapper, batch, per_row, groups):
    chosen = config(wrapper=wrapper, voter_batch=batch)
    assert (chosen.voters_per_row, chosen.groups) == (per_row, groups)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('data = "a"', "give --out"),
        ("lr =", "cannot be read"),
        ('data = "a"\nout = "b"\nlearning = 1', "'learning'"),
        ('rank = 3\n[wrapper]\nmethod = "vote"', "rank stands next to [wrapper]; put it into that table"),
        ("[wrapper]\nrank = 3", "method"),
        ("wrapper = 3", "wrapper must be a text or a table, got 3"),
        ('voters_see = "some"', "voter_batch must be"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, wanted):
    (tmp_path / "c.toml").write_text(text)
    flags = {} if "data" in text else HERE
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "c.toml", flags)
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nowhere.toml", {})
