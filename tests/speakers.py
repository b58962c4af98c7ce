"""One home for the tokenizers that tests decode with: small, of every kind, and real ones where their folders are."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests import zoo
from tests.words import real

_LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "Which currency do they use in Japan? They use the yen.",
    "def f(x):   return x + 1",
] * 20
_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
_WORDS = [
    "▁", "▁▁", "▁▁▁▁", "▁the", "▁Paris", "Paris", "▁is", "is", "a", "b", "é", "東", "�", ".", "▁.",
    "\n\n", "▁a", "'", "▁'",
]  # fmt: skip
#: A chat template that ends turns with a token that is not the end of a text.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _with_bytes(*, strip: bool) -> Any:
    """Falls back to bytes, in the manner of Llama 2 (a first space is stripped) or Gemma."""
    vocab = dict(_SPECIAL)
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS):
        vocab[token] = len(vocab)
    plain = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    plain.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")]
    )
    plain.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if strip else []),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _word_pieces() -> Any:
    plain = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    plain.train_from_iterator(_LINES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="[SEP]")


def _unigram(*, slow: bool) -> Any:
    """Trained by sentencepiece, with bytes; run by sentencepiece itself, or by the tokenizers library."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES), model_writer=model, vocab_size=330, model_type="unigram", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if slow:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
            return SentencePieceBackend(vocab_file=str(Path(folder) / "tokenizer.model"), **names)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    plain = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names)


_MADE = {
    "byte-level": zoo.tokenizer,
    "llama": lambda: _with_bytes(strip=True),
    "gemma-like": lambda: _with_bytes(strip=False),
    "wordpiece": _word_pieces,
    "unigram": lambda: _unigram(slow=False),
    "sentencepiece": lambda: _unigram(slow=True),
}
KINDS = (*_MADE, "pocket", "smollm2", "gemma", "qwen")


@cache
def words(kind: str) -> Any:
    """A tokenizer of this kind; None for a real one whose folder is not here."""
    return _MADE[kind]() if kind in _MADE else real(kind)


@cache
def speaker(kind: str, *, chat: bool = False) -> Any:
    """A random model that says anything in this tokenizer's tokens, with their risk."""
    import copy

    import torch

    from selfdoubt import RiskAwareLM

    tokenizer = copy.deepcopy(words(kind))
    tokenizer.chat_template = CHATML if chat else None
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return RiskAwareLM(model.eval().requires_grad_(False), tokenizer)
