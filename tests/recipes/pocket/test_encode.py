from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from recipes.pocket import tokenizer
from recipes.pocket.encode import encode, packed, padded
from recipes.pocket.facts import all_facts
from recipes.pocket.questions import Pair, pair_stream, sample_pairs
from selfdoubt.errors import ConfigError
from selfdoubt.pocket import folder


@pytest.fixture
def pieces(tiny):
    return tokenizer.train((text for p in sample_pairs(tiny, 0, 500) for text in (p.question, p.answer)), 400)


def test_any_text_survives_the_tokenizer(pieces):
    for text in ("Where is Zürich?", "東京 🌍", "a\n b\t+1809", ""):
        assert pieces.decode(pieces.encode(text).ids) == text
    assert len(pieces.encode("1809").ids) == 4


def test_encoding_equals_the_chat_template(pieces):
    words: Any = tokenizer.wrapped(pieces)
    pair = Pair("Where is Bern?", "The city of Bern is in Switzerland.", "country", "Bern")
    chat = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
    found = encode(pieces, [pair])[0]
    assert words.apply_chat_template(chat)["input_ids"] == found.ids
    assert words.decode(found.ids[found.question]) == pair.question
    assert words.decode(found.ids[found.answer]) == pair.answer + tokenizer.END
    asked = words.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert asked == found.ids[: found.answer.start]


def test_the_template_takes_several_turns_and_leaves_system_messages_out(pieces):
    words = tokenizer.wrapped(pieces)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Why?<|end|><|assistant|>"


def test_another_tokenizer_is_refused(pieces):
    from tokenizers import models

    with pytest.raises(ConfigError, match="found one without"):
        encode(Tokenizer(models.BPE()), [])


def test_packing_loses_nothing_and_keeps_pairs_apart(tiny, pieces):
    stream = pair_stream(all_facts(tiny), random.Random(0))
    rows = next(packed(pieces, stream, rows=8, length=96))
    mask, targets = rows.mask(), rows.targets()
    drawn = {tuple(e.ids) for e in encode(pieces, sample_pairs(tiny, 0, 512))}
    for r in range(8):
        for segment in range(1, int(rows.segments[r].max()) + 1):
            where = (rows.segments[r] == segment).nonzero()[:, 0]
            assert tuple(rows.ids[r, where].tolist()) in drawn
            assert rows.positions[r, where].tolist() == list(range(len(where)))
            inside = mask[r, 0][where]
            assert inside.sum() == len(where) * (len(where) + 1) // 2
            assert torch.equal(inside[:, where], torch.ones(len(where), len(where), dtype=torch.bool).tril())
            assert targets[r, where[:-1]].tolist() == rows.ids[r, where[1:]].tolist()
            last = int(where[-1])
            assert last == 95 or targets[r, last] == -100
    assert (rows.segments > 0).float().mean() > 0.8


def test_padding_counts_every_real_token_or_the_answer_only(tiny, pieces):
    encoded = encode(pieces, sample_pairs(tiny, 0, 16))
    every, answers = padded(encoded), padded(encoded, answers_only=True)
    for row, pair in enumerate(encoded):
        assert every["attention_mask"][row].sum() == len(pair.ids)
        assert every["labels"][row][: len(pair.ids)].tolist() == pair.ids
        assert (every["labels"][row][len(pair.ids) :] == -100).all()
        counted = answers["labels"][row] != -100
        assert answers["labels"][row][counted].tolist() == pair.ids[pair.answer]


def test_packed_rows_have_the_loss_of_single_pairs(tiny, pieces):
    from recipes.pocket.base_training import build_trunk, compute_loss, new_model

    model = new_model(pieces.get_vocab_size(), seed=0)
    rows = next(packed(pieces, pair_stream(all_facts(tiny), random.Random(0)), rows=2, length=96))
    losses = []
    for r in range(2):
        for segment in range(1, int(rows.segments[r].max()) + 1):
            ids = rows.ids[r][rows.segments[r] == segment][None]
            logits = model(input_ids=ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    alone = torch.cat(losses).mean().item()
    together = compute_loss(model, build_trunk(model, compiled=False), rows).item()
    assert together == pytest.approx(alone, rel=5e-3)  # bfloat16 products against float32


def test_the_shipped_tokenizer_survives_a_round_trip():
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder())
    for text in ("What is the capital of Côte d'Ivoire?", "where is são paulo", "東京"):
        assert words.decode(words(text)["input_ids"]) == text
    assert (words.pad_token, words.eos_token) == ("<|pad|>", "<|end|>")
