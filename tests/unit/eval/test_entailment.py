"""Entailment by a model: a tiny random one made on the spot, asked pair by pair as the slow way."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from selfdoubt.errors import ConfigError, LoadError, NonFiniteError
from selfdoubt.eval.scores import entailment
from selfdoubt.eval.scores.agreement import agreement_scores, cluster_answers
from selfdoubt.eval.scores.entailment import SameMeaning, find_entailment_class

LABELS = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
WORDS = ["what", "is", "the", "capital", "of", "france", "paris", "rome", "oslo", "it", "a"]


@pytest.fixture
def folder(tmp_path):
    """A classifier of two layers with random weights, and its tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=1.0, id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    return tmp_path


def test_two_answers_mean_the_same_where_each_entails_the_other(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    question = "What is the capital of France?"
    texts = ["Paris", "it is Paris", "Rome", "the capital of France is Oslo", "a", ""]

    def entails(a: str, b: str) -> bool:
        with torch.no_grad():
            inputs = tokenizer(f"{question} {a}".strip(), f"{question} {b}".strip(), return_tensors="pt")
            return LABELS[int(model(**inputs).logits.argmax())] == "ENTAILMENT"

    pairs = list(product(texts, texts))
    expected = [entails(a, b) and entails(b, a) for a, b in pairs]
    assert {True, False} == set(expected)
    assert SameMeaning(str(folder), device="cpu")(pairs, question) == expected
    assert SameMeaning(str(folder), batch_size=3, device="cpu")(pairs, question) == expected


def test_clusters_by_meaning_are_those_of_the_first_of_each(folder):
    alike = SameMeaning(str(folder), device="cpu")
    texts = ["Paris", "it is Paris", "Rome", "Paris", "Oslo"]
    leaders: list[int] = []
    expected = []
    for i, text in enumerate(texts):
        found = next((k for k, j in enumerate(leaders) if texts[j] == text or alike([(texts[j], text)], "")[0]), None)
        if found is None:
            leaders.append(i)
            found = len(leaders) - 1
        expected.append(found)
    assert cluster_answers(texts, alike) == expected
    assert agreement_scores("Paris", texts, alike=alike)["n_clusters"] == len(leaders)


def test_the_model_is_loaded_once(folder, monkeypatch):
    transformers = pytest.importorskip("transformers")
    loads = []
    original = transformers.AutoTokenizer.from_pretrained

    def counting_load(*args, **options):
        loads.append(args)
        return original(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", counting_load)
    for _ in range(2):
        SameMeaning(str(folder), device="cpu")([("Paris", "Rome")], "")
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        (["entailment", "neutral", "contradiction"], 0),
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], 2),
        (["entailment", "not_entailment"], 0),
        (["not_entailment", "Entailed"], 1),
    ],
)
def test_entailment_is_found_by_its_name(labels, label):
    assert find_entailment_class(dict(enumerate(labels)), "m") == label


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["entails", "entailment"]])
def test_labels_that_do_not_tell_are_refused(labels):
    with pytest.raises(ConfigError, match="exactly one must begin with 'entail'"):
        find_entailment_class(dict(enumerate(labels)), "m")


def test_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(LoadError, match="no model for entailment can be loaded") as raised:
        SameMeaning(str(tmp_path))([("a", "b")], "")
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="batch_size"):
        SameMeaning("m", batch_size=0)


def test_nan_is_an_error_and_never_a_difference(folder):
    model, _, _ = entailment._load(str(folder), None, "cpu")
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        SameMeaning(str(folder), device="cpu")([("Paris", "Rome")], "")
