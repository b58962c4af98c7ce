"""Training with compiled layers gives the losses of training without; in processes without checks of shapes."""

from __future__ import annotations

import pytest

from selfdoubt.errors import ConfigError
from selfdoubt.train import TrainConfig
from tests.plain import run

SETUP = """
import copy, torch
from dataclasses import replace
from selfdoubt import sculpt, vote
from selfdoubt.train.batches import collate
from selfdoubt.train.build import wrap_base
from selfdoubt.train.compiled import CompiledLayers
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.module import compute_loss
from tests.zoo import causal

WRAPPERS = {"vote": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5), "sculpt": sculpt.Wrapper(rank=3), "none": None}
def gradients(name, compiler, *, checkpointing=False):
    torch.manual_seed(0)
    config = TrainConfig(data="", out="", wrapper=WRAPPERS[name], lora_r=2, batch_size=4)
    model = wrap_base(copy.deepcopy(causal("llama")), config).train()
    base = model.module if config.wrapper else model
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    layers = None if compiler is None else CompiledLayers(model, compiler)
    found = []
    for length in (9, 12, 17):  # the second compiles for any length
        ids = torch.randint(3, 60, (4, length), generator=torch.Generator().manual_seed(length)).tolist()
        batch = collate([[{"ids": row, "counts": [False] + [True] * (length - 1)}] for row in ids], 1)
        if layers is not None:
            layers.on()
        loss = compute_loss(model, config, batch)
        loss.backward()
        if layers is not None:
            layers.off()
            assert not any("forward" in vars(m) for m in model.modules())
        found += [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found
"""


@pytest.mark.parametrize("name", ["vote", "none", pytest.param("sculpt", marks=pytest.mark.slow)])
def test_captured_layers_give_the_losses_and_gradients_of_plain_ones(name):
    """Captured as graphs, which plain operations run."""
    run(f"""{SETUP}
import torch._dynamo.utils as utils
torch.testing.assert_close(gradients({name!r}, "aot_eager"), gradients({name!r}, None), rtol=1e-5, atol=1e-6)
assert 1 <= utils.counters["stats"]["unique_graphs"] <= 12, utils.counters
""")


def test_captured_layers_are_run_again_in_the_backward_pass():
    run(f"""{SETUP}
found = gradients("vote", "aot_eager", checkpointing=True)
torch.testing.assert_close(found, gradients("vote", None), rtol=1e-5, atol=1e-6)
""")


@pytest.mark.slow
def test_compiled_layers_give_the_losses_and_gradients_of_plain_ones():
    run(f"""{SETUP}
torch.testing.assert_close(gradients("vote", "inductor"), gradients("vote", None), rtol=1e-4, atol=1e-5)
""")


def test_sharded_layers_are_not_compiled():
    with pytest.raises(ConfigError, match="compiled layers cannot be sharded by fsdp"):
        TrainConfig(data="", out="", compile=True, strategy="fsdp")
