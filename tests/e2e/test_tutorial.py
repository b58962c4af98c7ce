"""The calls of the published tutorial on our imports: three wrappers around a reduced language model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from selfdoubt import sample, sculpt, vote

BATCH, LENGTH, VOCABULARY = 3, 7, 50


class Reduced(nn.Module):
    """A language model without its embedding: vectors in, logits out."""

    def __init__(self, whole: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = whole.model
        self.lm_head = whole.lm_head

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        return self.lm_head(out.last_hidden_state)


WRAPPERS = {
    "vote": vote.EagerWrapper(
        param_filter="q_proj|v_proj", n_voters=3, finetune=True, verbose=2, weight_noise=0.2, alpha=1
    ),
    "sample": sample.Wrapper(symbolic_trace=False, n_samples=5, verbose=2),
    "sculpt": sculpt.Wrapper(symbolic_trace=False, n_layers=2, verbose=2, distribution=sculpt.Normal),
}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {"inputs_embeds": torch.randn(BATCH, LENGTH, 32), "attention_mask": mask}


@pytest.fixture
def model() -> Reduced:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Reduced(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape)))


def test_the_eager_name_is_the_same_wrapper() -> None:
    assert isinstance(WRAPPERS["vote"], (vote.Wrapper, vote.EagerWrapper))
    assert issubclass(vote.EagerWrapper, vote.Wrapper)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_training_step_lowers_the_loss_and_leaves_the_base_alone(
    name: str, model: Reduced, inputs: dict[str, Tensor]
) -> None:
    wrapper = WRAPPERS[name]
    if name != "vote":
        model.requires_grad_(name == "sample")
    wrapped = wrapper(model)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]  # they exist before any call
    assert trainable
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    target = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        if name == "vote":
            logits = wrapped(**inputs, return_risk=False, training=True)
        elif name == "sculpt":
            assert isinstance(wrapper, sculpt.Wrapper)
            y, risk = wrapped(**inputs, return_risk=True)
            logits = wrapper.distribution.sample((y, risk))
        else:
            logits = wrapped(**inputs, return_risk=False)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if name != "sample":
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", WRAPPERS)
def test_linear_layers_can_become_4_bit_after_wrapping(name: str, model: Reduced, inputs: dict[str, Tensor]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    wrapped = WRAPPERS[name](model).eval()
    expected = wrapped(**inputs, training=False)
    for parent in list(wrapped.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.out_features != VOCABULARY:
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4"
                )
                packed.load_state_dict(child.state_dict())
                setattr(parent, child_name, packed.to("cpu").requires_grad_(False))
    y, risk = wrapped(**inputs, return_risk=True, training=False)
    assert y.shape == risk.shape == (BATCH, LENGTH, VOCABULARY)
    assert torch.isfinite(y).all()
    assert (risk >= 0).all()
    assert F.cosine_similarity(y.flatten(), expected.flatten(), dim=0) > 0.9
