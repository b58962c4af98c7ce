"""Settings that contradict each other are said in one line, and a file means what it says."""

from __future__ import annotations

import pytest

from selfdoubt.errors import ConfigError
from selfdoubt.train.config import TrainConfig, read_config, to_toml


def config(**settings):
    return TrainConfig(**{"data": "data.json", "out": "out"} | settings)


def test_the_tutorials_settings_are_the_defaults():
    c = config()
    assert (c.n_voters, c.weight_noise, c.alpha, c.n_samples, c.n_layers) == (3, 0.2, 1.0, 5, 2)
    assert (c.lora_r, c.lora_alpha, c.lora_dropout) == (64, 64.0, 0.0)
    assert (c.lr, c.epochs, c.clip, c.precision, c.max_length, c.val_every) == (2e-4, 5, 1.0, "bf16-mixed", 400, 0.25)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"n_voters": 0}, "n_voters must be at least 1, got 0"),
        ({"batch_size": 10}, "use batch_size=12"),
        ({"wrapper": "guess"}, "'vote', 'sample', 'sculpt', 'none'"),
        ({"lr": 2}, "lr must be between 0 and 1"),
        ({"lr": float("nan")}, "lr must be float, got nan"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"val_share": 1}, "val_share must be"),
        ({"val_every": 0}, "val_every is a share"),
        ({"quantize": "nf4", "rank": 0}, "use a rank"),
        ({"quantize": "int3"}, "quantize must be"),
        ({"merge": True}, "voters cannot be merged"),
        ({"merge": True, "wrapper": "none", "quantize": "nf4"}, "cannot be merged into 4-bit"),
        ({"loggers": "csv,mlflow"}, "loggers must be csv, tensorboard, wandb or none, got mlflow"),
        ({"limit": 1}, "limit must be at least 2"),
    ],
)
def test_a_bad_setting_is_one_line(settings, wanted):
    with pytest.raises(ConfigError) as raised:
        read_config(None, {"data": "data.json", "out": "out"} | settings)
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_written_reads_back(tmp_path):
    chosen = config(data='a "quoted"\\path\n.json', lr=1e-5, limit=7, wrapper="sample", pack=True)
    (tmp_path / "c.toml").write_text(to_toml(chosen))
    assert read_config(tmp_path / "c.toml", {}) == chosen


def test_a_flag_wins_over_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('data = "a"\nout = "b"\nlr = 0.001\n')
    assert read_config(tmp_path / "c.toml", {"out": "c"}) == config(data="a", out="c", lr=1e-3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [('data = "a"', "give --out"), ("lr =", "cannot be read"), ('data = "a"\nout = "b"\nlearning = 1', "'learning'")],
)
def test_a_bad_file_is_one_line(tmp_path, text, wanted):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config(tmp_path / "c.toml", {})
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "nowhere.toml", {})
