"""Answers compared by a sentence encoder: against embeddings by hand, and what is not an encoder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from selfdoubt import pocket
from selfdoubt.errors import ConfigError, LoadError
from selfdoubt.eval.scores.agreement import GradedSame, agreement_scores, build_equivalence
from selfdoubt.eval.scores.embedding import DEFAULT_COSINE, SameSentence

WORDS = ["[PAD]", "[UNK]", "paris", "rome", "is", "it", "in", "france"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random encoder with a tokenizer of words."""
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)).save_pretrained(path)
    return path


def test_similarity_against_one_text_at_a_time(folder):
    rule = SameSentence(str(folder), batch_size=2)
    pairs = [("paris", "it is paris in france"), ("rome", "paris"), ("rome", "rome")]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def embed(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    expected = [max(0.0, torch.cosine_similarity(embed(a), embed(b), 0).item()) for a, b in pairs]
    assert rule.similarity(pairs) == pytest.approx(expected, abs=1e-5)
    assert SameSentence(str(folder), 0.9999)(pairs) == [False, False, True]
    assert isinstance(rule, GradedSame)
    found = agreement_scores("rome", ["rome", "paris"], None, rule, doubts={"sum_nll": 4.0})
    assert found["cocoa_sum_nll"] == pytest.approx(2 * (1 - expected[1]), abs=1e-4)


def test_the_rule_by_name(folder):
    assert build_equivalence(f"embed:{folder}") == SameSentence(str(folder), DEFAULT_COSINE)
    assert build_equivalence(f"embed:{folder}:0.9") == SameSentence(str(folder), 0.9)
    assert build_equivalence("embed:an/encoder:v2") == SameSentence("an/encoder:v2")
    with pytest.raises(ConfigError, match=r"above 0, at most 1; got 2\.0"):
        build_equivalence(f"embed:{folder}:2")
    with pytest.raises(ConfigError, match=r"no rule is called 'embed:'"):
        build_equivalence("embed:")


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(LoadError, match="which writes text; take a sentence encoder"):
        SameSentence(str(pocket.folder()))([("a", "b")])
    with pytest.raises(LoadError, match="no sentence encoder can be loaded from") as error:
        SameSentence(str(tmp_path))([("a", "b")])
    assert "\n" not in str(error.value)


def test_a_real_encoder_tells_capitals_apart():
    folder = Path(os.environ.get("SELFDOUBT_SENTENCE_ENCODER", "~/.cache/real-models/minilm")).expanduser()
    if not (folder / "config.json").is_file():
        pytest.skip(f"no sentence encoder in {folder}; point SELFDOUBT_SENTENCE_ENCODER at one")
    rule = SameSentence(str(folder))
    assert rule([("It is Paris.", "Paris, France"), ("Paris", "Rome")]) == [True, False]
