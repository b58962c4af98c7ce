"""One home for small tokenizers of every kind that models come with, and for chat templates modelled on public ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from tests.real import FOLDER

ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
SPECIALS = ["<unk>", "<s>", "</s>", *ROLES]
_CORPUS = [
    "What is the capital of France? The capital of France is Paris. https://example.org/a http://example.org",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 2))  # three",
    "São Paulo, Zürich, Łódź, 東京, Αθήνα, and a smile: 😀👩‍👩‍👧  twice  the  space",
] * 20
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _fast(plain: Any, **options: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=ROLES, chat_template=CHAT, **options,
    )  # fmt: skip


def _bpe(normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, **options: Any) -> Any:
    from tokenizers import Tokenizer, models, trainers

    alphabet = options.pop("alphabet", [])
    extra = [f"<0x{i:02X}>" for i in range(256)] if options.get("byte_fallback") else []
    plain = Tokenizer(models.BPE(unk_token=None if alphabet else "<unk>", fuse_unk=False, **options))
    if normalizer is not None:
        plain.normalizer = normalizer
    if pre_tokenizer is not None:
        plain.pre_tokenizer = pre_tokenizer
    plain.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIALS, *extra], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(_CORPUS, trainer)
    data = json.loads(plain.to_str())  # bytes are pieces like any other, and no control tokens
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in extra]
    return Tokenizer.from_str(json.dumps(data))


def byte_level(**options: Any) -> Any:
    """As GPT-2, Llama 3, Qwen, SmolLM have it."""
    from tokenizers import decoders, pre_tokenizers

    return _bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel(),
        alphabet=pre_tokenizers.ByteLevel.alphabet(), **options,
    )  # fmt: skip


def metaspace(scheme: str) -> Any:
    """As Llama 2 and Mistral have it: with a space before the first word, before each piece ("always"), or none."""
    from tokenizers import decoders, pre_tokenizers

    return _bpe(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoder=decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        ]),
        byte_fallback=True,
    )  # fmt: skip


def prepended() -> Any:
    """The older file format of the same: a normaliser writes the first space."""
    from tokenizers import decoders, normalizers

    return _bpe(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        ]),
        byte_fallback=True,
    )  # fmt: skip


def word_piece() -> Any:
    """As BERT has it: lower case, words apart, white space lost."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    plain = Tokenizer(models.WordPiece(unk_token="<unk>"))
    plain.normalizer = normalizers.BertNormalizer(lowercase=True)
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False)
    plain.train_from_iterator(_CORPUS, trainer)
    return plain


def framed(plain: Any, start: str = "<s>", end: str = "</s>") -> Any:
    """The same tokenizer with a start and an end put around every text."""
    from tokenizers import processors

    template = " ".join(part for part in (start, "$A", end) if part)
    special = [(t, plain.token_to_id(t)) for t in ("<s>", "</s>")]
    own = processors.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=special)
    plain.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), own])
    return plain


@cache
def small(name: str) -> Any:
    """A small tokenizer with a chat template, by name; shared."""
    if name == "python":
        slow = transformers.ByT5Tokenizer(bos_token="<s>", additional_special_tokens=ROLES, extra_ids=0)
        slow.chat_template = CHAT
        return slow
    made = {
        "byte-level": byte_level,
        "metaspace first": lambda: metaspace("first"),
        "metaspace always": lambda: metaspace("always"),
        "metaspace never": lambda: metaspace("never"),
        "prepended": prepended,
        "word-piece": word_piece,
        "starts and ends": lambda: framed(byte_level()),
        "ends": lambda: framed(byte_level(), start=""),
        "starts": lambda: framed(metaspace("first"), end=""),
    }
    return _fast(made[name]())


SMALL = (
    "byte-level", "metaspace first", "metaspace always", "metaspace never", "prepended", "word-piece",
    "starts and ends", "ends", "starts", "python",
)  # fmt: skip
#: Those that lose nothing of a text.
LOSSLESS = tuple(name for name in SMALL if name != "word-piece")


@cache
def real(name: str) -> Any:
    """The tokenizer of a real model, or None where its folder is missing; "pocket" is always there."""
    from selfdoubt import pocket

    folder = pocket.folder() if name == "pocket" else FOLDER / name
    if not Path(folder, "tokenizer.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
