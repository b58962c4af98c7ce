"""Writes voters as ordinary PEFT adapters: one LoRA folder each, for PEFT, vLLM and other tools that read LoRA.

A deviation of a linear layer is LoRA already: ``alpha * B A`` with ``lora_alpha = alpha * rank``. A full one is LoRA of
rank ``min(in, out)``, one of its factors being the identity: exact, and large.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from selfdoubt import compat, kernels, storage
from selfdoubt.errors import BaseMismatchError, WrapError, require
from selfdoubt.lm.adapters.adapter import AdapterFolder
from selfdoubt.lm.adapters.lora import list_lora_names, shorten_names, write_peft
from selfdoubt.lm.load import load_skeleton
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement
from selfdoubt.vote import VotingLeaf
from selfdoubt.vote import Wrapper as Vote
from selfdoubt.wrapping import get_base_name, get_source, innermost


@dataclass(frozen=True)
class Voters:
    """The content of the voters' PEFT adapters: settings, the leaves' deviations, and names of the base."""

    spec: Vote
    leaves: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]]  #: by name in the base: the layer, its deviations
    modules: Iterable[str]  #: names of all modules of the base
    is_causal: bool
    base: str | None


def write_voters(voters: Voters, folder: Path) -> list[Path]:
    """Write ``voter-0``, ``voter-1``, ... into a folder.

    Raises:
        WrapError: If a deviation is of a layer that LoRA cannot hold, or the base was trained as well.
    """
    if not voters.spec.finetune:
        raise WrapError(
            "voters with finetune=False train the rest of the model as well, which no PEFT adapter holds; "
            "train with finetune=True"
        )
    if voters.spec.start == "answer":
        raise WrapError(
            "voters with start='answer' read the answer only, and a PEFT adapter acts on the prompt, too: it would be "
            "another model; train with start='prompt'"
        )
    biased = any("bias" in deviations for _, deviations in voters.leaves.values())
    for name, (layer, _) in voters.leaves.items():
        _check_layer(name, layer, biased=biased)
    rank = max(_rank(layer, deviations) for layer, deviations in voters.leaves.values())
    peft = require("peft", "train")
    scale = voters.spec.alpha * rank
    config = peft.LoraConfig(
        r=rank, lora_alpha=int(scale) if scale == int(scale) else scale, inference_mode=True, lora_bias=biased,
        target_modules=shorten_names(list(voters.leaves), voters.modules), base_model_name_or_path=voters.base,
        fan_in_fan_out=any(compat.is_transposed(layer) for layer, _ in voters.leaves.values()),
        task_type="CAUSAL_LM" if voters.is_causal else None,
    )  # fmt: skip
    folders = [folder / f"voter-{m}" for m in range(voters.spec.n_voters)]
    for m, path in enumerate(folders):
        tensors: dict[str, Tensor] = {}
        for name, (layer, deviations) in voters.leaves.items():
            one = {key: deviation[m].detach().cpu() for key, deviation in deviations.items()}
            for key, tensor in _lora(layer, one, rank, biased=biased).items():
                tensors[f"base_model.model.{name}.{key}"] = tensor
        write_peft(path, config.to_dict(), tensors)
    if voters.spec.rank is None:
        size = sum(file.stat().st_size for file in folders[0].iterdir()) / 2**20
        warnings.warn(
            f"full deviations become LoRA of rank {rank}, {size:.1f} MiB a voter; voters with rank=16 are small",
            stacklevel=3,
        )
    return folders


def read_voters(wrapped: nn.Module, base: str | None = None) -> Voters:
    """Return the voters of a wrapped model.

    Raises:
        WrapError: If the model has no voters, or they lie on LoRA or on another wrapper's layers.
    """
    if not isinstance(wrapped, Wrapped) or not isinstance(wrapped.spec, Vote):
        raise WrapError(f"only voters become PEFT adapters, and this is {_describe(wrapped)}; wrap with vote.Wrapper")
    if list_lora_names(wrapped):
        raise _on_lora("the model")
    inner = innermost(wrapped)
    replaced = [name for name, module in wrapped.named_modules() if isinstance(module, Replacement)]
    leaves: dict[str, tuple[nn.Module, Mapping[str, Tensor]]] = {}
    for path, leaf in wrapped.named_modules():
        if not isinstance(leaf, VotingLeaf):
            continue
        name = get_base_name(wrapped, path)
        if any(path.startswith(f"{r}.") and not f"{path}.".startswith(f"{r}.leaf.") for r in replaced):
            raise WrapError(f"voters deviate in {name}, which another wrapper added; narrow their param_filter")
        leaves[name] = (compat.get_base_layer(leaf.leaf), dict(leaf.deviations))
    modules = {get_base_name(inner, name) for name, _ in inner.named_modules()}
    return Voters(wrapped.spec, leaves, modules, _is_causal(inner), base or get_source(inner))


def load_voters(
    adapter: AdapterFolder, *, base: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Voters:
    """Load the voters of an adapter folder; of the base model only the config is read.

    Args:
        adapter: A checked adapter folder.
        base: Name or folder of the base model; None takes the one that the manifest names.
        revision: Revision of the base model; None takes the manifest's, if the base is the manifest's.
        trust_remote_code: Run code that comes with the model.

    Raises:
        LoadError: If the folder or the base cannot be read.
        BaseMismatchError: If the voters were made for another base.
        WrapError: If the folder has no voters, or they lie on LoRA.
    """
    folder, manifest = adapter.path, adapter.manifest
    if manifest is None:
        raise WrapError(f"{folder} is LoRA of plain PEFT and has no voters; it is a PEFT adapter already")
    spec = storage.from_json(manifest["wrappers"][-1]) if manifest["wrappers"] else None
    if not isinstance(spec, Vote):
        raise WrapError(f"only voters become PEFT adapters, and {folder} holds {spec!r}; train with wrapper='vote'")
    if manifest.get("lora"):
        raise _on_lora(str(folder))
    name, revision = adapter.choose_base(base, revision)
    model = load_skeleton(name, revision=revision, trust_remote_code=trust_remote_code)
    modules = dict(model.named_modules())
    leaves: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    for key, tensor in storage.read_tensors(folder / storage.WEIGHTS).items():
        path, is_deviation, parameter = key.removeprefix("module." * len(manifest["wrappers"])).rpartition(
            ".deviations."
        )
        if not is_deviation:
            continue  # what a sculpt inside added: a voter's logits do not need it
        if path not in modules:  # inside what a sculpt replaced
            path = ".".join(part for part in path.split(".") if part != "leaf")
        if path not in modules:
            raise BaseMismatchError(f"{folder} does not fit {name}: it deviates in {path}, which the model lacks")
        leaves.setdefault(path, (modules[path], {}))[1][parameter] = tensor
    if not leaves:
        raise BaseMismatchError(f"{folder} holds no deviations; save or download it again")
    for path, (layer, deviations) in leaves.items():
        _check_fits(folder, name, path, layer, deviations, spec)
    return Voters(spec, leaves, modules, _is_causal(model), name)


def _rank(layer: nn.Module, deviations: Mapping[str, Tensor]) -> int:
    if "weight_b" in deviations:
        return deviations["weight_b"].shape[1]
    return min(kernels.count_features(layer)) if "weight" in deviations else 1


def _lora(layer: nn.Module, deviation: dict[str, Tensor], rank: int, *, biased: bool) -> dict[str, Tensor]:
    """Return one voter's deviation of one layer under PEFT's names; short factors are filled with zeros."""
    fan_in, fan_out = kernels.count_features(layer)
    like = next(iter(deviation.values()))
    looks_up = isinstance(layer, nn.Embedding)
    if "weight_a" in deviation:
        a, b = deviation["weight_a"], deviation["weight_b"].T
        a = a.T if looks_up else a
    elif "weight" in deviation:
        weight = deviation["weight"].T if looks_up or compat.is_transposed(layer) else deviation["weight"]
        one = torch.eye(min(fan_in, fan_out), dtype=weight.dtype)
        a, b = (one, weight) if fan_in <= fan_out else (weight, one)
    else:
        a, b = like.new_zeros(1, fan_in), like.new_zeros(fan_out, 1)
    a = torch.cat([a, a.new_zeros(rank - len(a), fan_in)])
    b = torch.cat([b, b.new_zeros(fan_out, rank - b.shape[1])], dim=1)
    if looks_up:
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    bias = {"lora_B.bias": deviation.get("bias", like.new_zeros(fan_out))} if biased else {}
    return {"lora_A.weight": a, "lora_B.weight": b, **bias}


def _check_layer(name: str, layer: nn.Module, *, biased: bool) -> None:
    if kernels.find_kernel(layer) not in (kernels.linear, kernels.embedding):
        raise WrapError(
            f"LoRA holds deviations of linear and embedding layers, and {name} is {type(layer).__name__}; "
            'train voters of linear layers only, e.g. param_filter="q_proj|v_proj"'
        )
    if biased and isinstance(layer, nn.Embedding):
        raise WrapError(
            f"PEFT cannot hold deviations of biases together with those of the embedding {name}; "
            "train voters of weights only, e.g. param_filter='weight'"
        )


def _check_fits(
    folder: Path, base: str, name: str, layer: nn.Module, deviations: Mapping[str, Tensor], spec: Vote
) -> None:
    """Check that deviations read from a file have the shapes that their layer needs."""
    if kernels.find_kernel(layer) not in (kernels.linear, kernels.embedding):
        return
    fan_in, fan_out = kernels.count_features(layer)
    n, r = spec.n_voters, spec.rank or 0
    a = (n, fan_in, r) if isinstance(layer, nn.Embedding) else (n, r, fan_in)
    flat = (
        (n, fan_in, fan_out) if isinstance(layer, nn.Embedding) or compat.is_transposed(layer) else (n, fan_out, fan_in)
    )
    expected = {"weight": flat, "bias": (n, fan_out), "weight_a": a, "weight_b": (n, r, fan_out)}
    for parameter, tensor in deviations.items():
        if expected.get(parameter) != tuple(tensor.shape):
            raise BaseMismatchError(
                f"{folder} does not fit {base}: the deviation of {name}.{parameter} is {tuple(tensor.shape)}, "
                f"and the model wants {expected.get(parameter)}"
            )


def _is_causal(model: nn.Module) -> bool:
    return compat.get_output_head(model) is not None


def _describe(model: nn.Module) -> str:
    return repr(model.spec) if isinstance(model, Wrapped) else f"a plain {type(model).__name__}"


def _on_lora(what: str) -> WrapError:
    return WrapError(
        f"{what} has voters on top of LoRA, and a PEFT adapter is one or the other: merge the LoRA first "
        "(selfdoubt export --merge), then export the voters of the merged model"
    )
