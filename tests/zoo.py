"""One home for the models that tests wrap: tiny, random, float64, the same on every call."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
CONTEXT = 64

_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LLAMA = _SMALL | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
#: Sliding windows are shorter than the sequences in the tests, so that caches have to forget.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 5},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 4},
    "gemma2": _LLAMA | {"head_dim": 4, "sliding_window": 5},
    "phi3": _LLAMA | {"sliding_window": 5},
    "gpt2": _SMALL | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.3},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "opt": _SMALL
    | {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "init_std": 0.3,
    },
}
FAMILIES = tuple(_CONFIGS)


@cache
def causal(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A causal language model; shared between tests, because wrapping leaves it as it is."""
    config = transformers.AutoConfig.for_model(family, **_CONFIGS[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # new biases are 0 and new norms 1: nothing would show a wrong one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return _share(f"causal {family} {dtype}", model.eval().requires_grad_(False))


@cache
def encoder(kind: str) -> nn.Module:
    """A classifier of texts ("bert") or of images ("vit")."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    auto: Any
    if kind == "bert":
        sizes["vocab_size"] = VOCABULARY
        auto = transformers.AutoModelForSequenceClassification
    else:
        sizes |= {"image_size": 8, "patch_size": 4}
        auto = transformers.AutoModelForImageClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = auto.from_config(transformers.AutoConfig.for_model(kind, **sizes)).double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return _share(f"encoder {kind}", model.eval())


#: Every model that is shared, by the name of what made it, and how it was when it was made.
_SHARED: dict[str, tuple[nn.Module, str]] = {}


def _share(name: str, model: nn.Module) -> nn.Module:
    _SHARED[name] = model, _describe(model)
    return model


def _describe(model: nn.Module) -> str:
    """Return a checksum of the weights, types, modes and layers of a model, and of its config."""
    # Saving a model adds its architectures.
    config = {name: value for name, value in model.config.to_dict().items() if name != "architectures"}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    found.update(str([(name, type(m).__name__, m.training) for name, m in model.named_modules()]).encode())
    return found.hexdigest()


def check_shared() -> None:
    """Fail if a shared model is no longer as it was made.

    Raises:
        AssertionError: With the name of the model. It is made again for the tests that follow.
    """
    changed = [name for name, (model, before) in _SHARED.items() if _describe(model) != before]
    if changed:
        _SHARED.clear()
        for make in (causal, encoder, talker):
            make.cache_clear()
    assert not changed, f"these shared models were changed: {changed}; change a copy.deepcopy"


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def mlp(*widths: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A perceptron with tanh between its layers, in evaluation mode."""
    widths = widths or (4, 8, 3)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn() -> nn.Sequential:
    """A small network for images, in evaluation mode."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 5, 2)
    ).double().eval()  # fmt: skip


class Pair(NamedTuple):
    mask: Tensor
    flags: Tensor


class Structured(nn.Module):
    """Takes a tensor, and more inside a dict; gives tensors in nested containers, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor, extra: dict[str, Any], *, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.inner(x + extra["shift"])
        if scale is not None:
            y = y * scale
        return {"pair": Pair(y, y > 0), "list": [y.sum(-1), None], "steps": 2, "constant": torch.ones(11)}


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Which currency do they use in Japan? They use the yen, which is ¥.",
    "São Paulo, Zürich, Łódź, 東京, Αθήνα, and a smile: 😀👩‍👩‍👧",
] * 20


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on a handful of sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(_CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT,
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )  # fmt: skip


@cache
def talker() -> nn.Module:
    """A random causal language model for ``tokenizer()``."""
    words = tokenizer()
    its_own = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "max_position_embeddings": 256}
    config = transformers.AutoConfig.for_model("llama", **_LLAMA | its_own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return _share("talker", model.eval().requires_grad_(False))


def packable() -> nn.Module:
    """A random causal language model for ``tokenizer()`` in float32, wide enough to be packed into 4 bits on a CPU."""
    its_own = {
        "vocab_size": len(tokenizer()), "max_position_embeddings": 256, "hidden_size": 64, "intermediate_size": 128,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("llama", **_LLAMA | its_own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)
