"""Loads a causal language model and its tokenizer by name or from a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from selfdoubt import compat
from selfdoubt.errors import ConfigError, LoadError, SelfdoubtError, require
from selfdoubt.lm.gguf import choose_gguf, fetch_gguf, find_gguf, load_gguf, read_gguf_config
from selfdoubt.wrapping import innermost

POCKET = "pocket"
Quantization = Literal["nf4"]


def load_model(
    name: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantize: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load a Hugging Face causal language model, frozen and in evaluation mode, and its tokenizer.

    Only safetensors weights are read, never pickles; or a GGUF file, whose weights are dequantised.

    Args:
        name: A folder, a name on the hub, a GGUF file (also ``org/name:file.gguf`` on the hub), or "pocket" for the
            small model inside this package.
        tokenizer: A folder with another tokenizer than the model's own.
        dtype: "auto" takes the checkpoint's own, but bfloat16 for float16 on a CPU and for quantised GGUF weights.
        device: None takes a GPU where there is one.
        quantize: "nf4" loads 4-bit weights by bitsandbytes (double quantisation, bfloat16 compute); not of a GGUF file.
        revision: A branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
        token: A hub token for gated models; None takes ``HF_TOKEN``.

    Raises:
        LoadError: If the model is missing, gated, has no safetensors weights, or cannot be read.
        ConfigError: If an option is unknown, or 4-bit weights are asked of a GGUF file.
        MissingExtraError: If transformers, gguf or bitsandbytes is not installed.
    """
    transformers = require("transformers", "lm")
    source = resolve_model(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    token = token or os.environ.get("HF_TOKEN")
    if quantize is not None and find_gguf(source) is not None:
        raise ConfigError(
            f"{name} is a GGUF file, whose weights are dequantised: quantize={quantize!r} takes a folder, which "
            "load_model(file)[0].save_pretrained(folder) and [1].save_pretrained(folder) write"
        )
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "token": token,
        "local_files_only": Path(source).is_dir(),
    }
    options = dict(common, dtype=_dtype(dtype), use_safetensors=True)
    if quantize is not None:
        options |= _quantized(quantize, device)
    transformers.utils.logging.disable_progress_bar()
    try:
        file = fetch_gguf(source, revision=revision, token=token)
        if file is not None:
            model, words = load_gguf(file, source, dtype=options["dtype"], with_tokenizer=tokenizer is None)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
            words = None if tokenizer is not None else transformers.AutoTokenizer.from_pretrained(source, **common)
        if tokenizer is not None:
            words = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except SelfdoubtError:
        raise
    except Exception as error:
        raise LoadError(_why(str(name), error)) from error
    compat.forbid_repacking(model)
    if quantize is None:
        model = model.to(device)
        if model.dtype == torch.float16 and device.type == "cpu":
            model = model.to(torch.bfloat16)
    if words.pad_token_id is None:
        # Padding is masked out, so any token serves; the vocabulary must not grow.
        words.pad_token = words.eos_token or words.unk_token
    return model.eval().requires_grad_(False), words


def choose_dtype(model: nn.Module) -> torch.dtype:
    """Choose the quickest dtype for a model on its device: its own, but float32 on a CPU that emulates bfloat16.

    Emulated products are ten times slower than float32's. A model that would fill more than half of the memory in
    float32 keeps its type: slow is better than none.
    """
    first = next(model.parameters())
    dtype: torch.dtype = first.dtype
    if first.device.type != "cpu" or dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return torch.float32 if 4 * sum(p.numel() for p in model.parameters()) <= memory / 2 else dtype


def find_stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Find the token ids that end an answer: those that end a text or a turn, by config, tokenizer and chat template.

    They are the ends that the generation config names; the config's, as far as they are control tokens (a config
    without any inherits its class's number, which may be a word); the tokenizer's; and ``find_turn_end``. They count
    for chats and for plain text alike: no text holds a control token.
    """
    base = innermost(model)
    named = _ids(getattr(getattr(base, "generation_config", None), "eos_token_id", None))
    config = getattr(base, "config", None)
    control = set(_control_tokens(tokenizer).values())
    inherited = {i for part in (config, *_text_configs(config)) for i in _ids(getattr(part, "eos_token_id", None))}
    return frozenset({*named, *(inherited & control), *_ids(tokenizer.eos_token_id), *_ids(find_turn_end(tokenizer))})


def find_turn_end(tokenizer: Any) -> int | None:
    """Return the control token with which the chat template ends an assistant's turn; None where it ends with none.

    It is the token that the rendered template has after an answer's text, apart from white space. A token that opens a
    turn is not one.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _MARKS[0]}, {"role": "assistant", "content": _MARKS[1]}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates are programs that raise any error; rendering a question reports it
        return None
    before, mark, after = text.rpartition(_MARKS[1])
    front, _, between = before.partition(_MARKS[0])
    control = _control_tokens(tokenizer)
    end = _first_token(after.lstrip(), control)
    if not mark or end is None or end == tokenizer.bos_token != tokenizer.eos_token:
        return None
    opened = any(token in front for token in control if token != tokenizer.bos_token)
    if opened and after.strip() == between.strip() and not any(t in after.lstrip()[len(end) :] for t in control):
        return None  # the template ends no turn, but opens one more
    return control[end]


#: Contents that no template knows.
_MARKS = ("\ue000", "\ue001")


def _first_token(text: str, control: dict[str, int]) -> str | None:
    """Return the control token that a text begins with: the longest."""
    return max((token for token in control if text.startswith(token)), key=len, default=None)


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of tokens that are not text, by the form in which the chat template writes them."""
    marked = {
        str(token): i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or re.fullmatch(r"<.+>|\[.+\]", str(token))
    }
    named = {str(t): i for t, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)}
    return {token: i for token, i in {**marked, **named}.items() if token.strip()}


def _text_configs(config: Any) -> list[Any]:
    """Return the config of the part that writes, where a model has several."""
    return [config.get_text_config()] if hasattr(config, "get_text_config") else []


def _ids(ids: Any) -> set[int]:
    return set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}


def count_token_ids(model: nn.Module) -> int:
    """Return the number of token ids that a model reads, also where LoRA or voters lie around its embedding."""
    embedding: Any = innermost(model).get_input_embeddings()  # type: ignore[operator]
    return int(compat.get_base_layer(embedding).num_embeddings)  # type: ignore[arg-type]


def load_skeleton(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Build the layers of a Hugging Face causal language model without their weights: only its config is read.

    Raises:
        LoadError: If the model is missing, gated, or cannot be built.
        MissingExtraError: If transformers is not installed.
    """
    transformers = require("transformers", "lm")
    source = resolve_model(name)
    token = os.environ.get("HF_TOKEN")
    common = {"trust_remote_code": trust_remote_code}
    try:
        file = fetch_gguf(source, revision=revision, token=token)
        config = read_gguf_config(file) if file is not None else transformers.AutoConfig.from_pretrained(
            source, revision=revision, token=token, local_files_only=Path(source).is_dir(), **common
        )  # fmt: skip
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **common)
    except SelfdoubtError:
        raise
    except Exception as error:
        raise LoadError(_why(str(name), error)) from error
    return model


def resolve_model(name: str | os.PathLike[str]) -> str:
    """Return the folder, GGUF file or hub name to load.

    Args:
        name: A model folder; a GGUF file, ``folder:file.gguf``, or a folder with one GGUF file; a hub name, with
            ``:file.gguf`` for a GGUF file there; or "pocket".

    Raises:
        LoadError: If it looks like a folder or file and is not there, or is not a model.
    """
    text = os.fspath(name)
    if text == POCKET and not Path(text).is_dir():
        from selfdoubt import pocket

        return str(pocket.folder())
    path = Path(text).expanduser()
    if path.is_dir():
        gguf = None if (path / "config.json").is_file() else choose_gguf(path)
        if gguf is None and not (path / "config.json").is_file():
            raise LoadError(
                f"{text} is not a model folder: it has no config.json and no GGUF file; "
                "give a Hugging Face model folder"
            )
        return str(gguf or path)
    file = find_gguf(text)
    if file is not None:
        return file
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.exists() or not text:
        raise LoadError(
            f"no model folder at {text!r}; give a folder with config.json, a GGUF file, a hub name, or 'pocket'"
        )
    return text


def find_pocket_voters() -> Path:
    """Return the adapter folder of the voters that come with the pocket model."""
    from selfdoubt import pocket

    return pocket.voters_folder()


def name_base(name: str | None) -> str | None:
    """Return the name under which a model loads on any machine: "pocket" for its folder in this package."""
    from selfdoubt import pocket

    return POCKET if name is not None and Path(name) == pocket.folder() else name


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigError(f"dtype must be auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    return named


def _quantized(quantize: str, device: torch.device) -> dict[str, Any]:
    """Return the options with which quantised weights are loaded."""
    if quantize != "nf4":
        raise ConfigError(f"quantize must be 'nf4' or None, got {quantize!r}")
    return {"quantization_config": compat.build_nf4_config(), "device_map": {"": str(device)}}


def _why(name: str, error: Exception) -> str:
    """Explain an error of transformers or the hub in one line, with the repair."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 8:
        chain.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    text = " ".join(" ".join(chain).split())
    first = " ".join(str(error).split())[:200]
    if "GatedRepo" in text or "gated repo" in text or ("401 Client Error" in text and "gated" in text):
        return f"{name} is gated: accept its licence on its page, then set HF_TOKEN to a token of your account"
    if "RepositoryNotFound" in text or "is not a valid model identifier" in text:
        return f"no model named {name!r} on the hub, or it is private: check the name, or set HF_TOKEN"
    if "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
        return (
            f"{name} has no safetensors weights, and pickled ones are never read: convert it with save_pretrained, or "
            "name its GGUF file where it has one"
        )
    if "trust_remote_code" in text:
        return f"{name} comes with its own code: read it, then pass trust_remote_code=True to run it"
    if any(
        w in text for w in ("ConnectionError", "ConnectError", "LocalEntryNotFound", "OfflineMode", "couldn't connect")
    ):
        return f"{name!r} is not on this machine and the hub cannot be reached: give a folder, or check the network"
    if "EntryNotFound" in text or ("config.json" in text and "does not appear to have" in text):
        return f"{name} has no such file, or no config.json: for a GGUF file on the hub give org/name:file.gguf"
    return f"{name} cannot be loaded ({type(error).__name__}: {first})"
