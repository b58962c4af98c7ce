"""Text in, text with its risk out: generate, stream, score and the ways to answer again agree with each other."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

import selfdoubt
from selfdoubt import RiskAwareLM, sample, sculpt, vote
from selfdoubt.errors import ConfigError, LoadError, NonFiniteError, PromptError
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.lm.text.prompt import encode
from tests.zoo import talker, tokenizer

WRAPPERS = {
    "vote": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5),
    "sample": sample.Wrapper(n_samples=3),
    "sculpt": sculpt.Wrapper(),
}
QUESTIONS = ["What is the capital of France?", "Hi", "Which currency do they use in Łódź 😀?"]
NUMBERS = ("logprob", "total", "aleatoric", "epistemic", "disagreement", "spread", "risk")


def talking(name="vote", **options):
    return RiskAwareLM(WRAPPERS[name](talker()) if name else talker(), tokenizer(), **options)


def numbers(tokens):
    return torch.tensor([[getattr(t, n) for n in NUMBERS] for t in tokens], dtype=torch.float64)


def assert_same(found, expected):
    assert found.text == expected.text
    assert found.finish == expected.finish
    for a, b in ((found.tokens, expected.tokens), (found.question, expected.question)):
        assert [(t.id, t.text) for t in a] == [(t.id, t.text) for t in b]
        torch.testing.assert_close(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    assert found.scores == pytest.approx(dict(expected.scores), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", [*WRAPPERS, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_prompts_gives_what_each_gives_alone(name, temperature):
    lm, options = talking(name), {"max_tokens": 12, "temperature": temperature, "seed": 3}
    together = lm.generate(QUESTIONS, **options)
    for answer, question in zip(together, QUESTIONS, strict=True):
        assert_same(answer, lm.generate(question, **options))
    for split, whole in zip(lm.generate(QUESTIONS, batch_size=2, **options), together, strict=True):
        assert_same(split, whole)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_stream_is_the_answer_in_pieces(name):
    lm = talking(name)
    stream = lm.stream(QUESTIONS[0], max_tokens=10, temperature=1.0, seed=1)
    assert "".join(t.text for t in stream.question) == QUESTIONS[0]
    with pytest.raises(ConfigError, match=r"^the answer is not finished"):
        _ = stream.answer
    tokens = list(stream)
    assert_same(stream.answer, lm.generate(QUESTIONS[0], max_tokens=10, temperature=1.0, seed=1))
    assert stream.answer.tokens == tuple(tokens)


@pytest.mark.parametrize("name", [*WRAPPERS, None])
def test_teacher_forcing_gives_the_scores_of_generation(name):
    lm, prompt = talking(name), encode(tokenizer(), QUESTIONS[0])
    answer = lm.generate(QUESTIONS[0], max_tokens=10)
    (scored,), _ = prefill(HFStepper(lm.model), [[*prompt.ids, *(t.id for t in answer.tokens)]])
    found = torch.tensor([[getattr(t, n) for n in NUMBERS[:-1]] for t in scored[len(prompt.ids) :]]).double()
    torch.testing.assert_close(found, numbers(answer.tokens)[:, :-1], rtol=1e-4, atol=1e-5)
    if name == "sculpt":
        scales = [t.scale for t in answer.tokens]
        assert scales == pytest.approx([t.scale for t in scored[len(prompt.ids) :]])
        assert answer.scores["mean_scale"] == pytest.approx(sum(scales) / len(scales))


def test_score_of_a_text_and_of_an_answer():
    lm = talking()
    text = "The capital of France is Paris."
    answer = lm.score(text, QUESTIONS[0])
    assert answer.text == "".join(t.text for t in answer.tokens) == text
    assert "".join(t.text for t in answer.question) == QUESTIONS[0]
    assert answer.finish == "given"
    assert_same(lm.score(text), lm.score(text, None))
    bare = lm.score(text)
    assert "".join(t.text for t in bare.tokens) == text
    assert bare.question == ()
    assert bare.risk_name == "sum_nll"
    first = talker()(torch.tensor([[tokenizer().bos_token_id]])).logits[0, -1].log_softmax(-1)
    plain = talking(None).score(text)
    assert plain.tokens[0].logprob == pytest.approx(first[plain.tokens[0].id].item(), abs=1e-5)


def test_tokens_hold_together():
    answer = talking().generate(QUESTIONS[2], max_tokens=20, temperature=1.0)
    assert "".join(t.text for t in answer.tokens).removesuffix("\ufffd") in answer.text
    for t in (*answer.tokens, *answer.question):
        assert t.total == pytest.approx(t.aleatoric + t.epistemic, abs=1e-6)
        assert 0 <= t.epistemic <= math.log(3)
        assert t.risk == t.nll
        assert t.nll == -t.logprob >= 0
        assert len(t.alternatives) in (0, 5)
        shares = [a.probability for a in t.alternatives]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1 + 1e-9
    assert answer.most_doubtful.risk == max(t.risk for t in answer.tokens)
    greedy = talking().generate(QUESTIONS[0], max_tokens=3)
    assert [t.alternatives[0].id for t in greedy.tokens] == [t.id for t in greedy.tokens]
    assert greedy.tokens[0].alternatives[0].probability == pytest.approx(math.exp(greedy.tokens[0].logprob))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*WRAPPERS, None])
def test_what_could_have_been_said_adds_up_to_at_most_one_in_any_dtype(name, dtype):
    model = copy.deepcopy(talker()).to(dtype)
    model.lm_head.weight *= 40  # sure, as trained models are: rounding shows where probabilities are near 1
    lm = RiskAwareLM((WRAPPERS[name](model) if name else model).eval(), tokenizer())
    for temperature in (0.0, 1.0, 3.0):
        answer = lm.generate(QUESTIONS[0], max_tokens=12, temperature=temperature, seed=1)
        for t in (*answer.tokens, *lm.score("The capital of France is Paris.", QUESTIONS[0]).tokens):
            shares = {a.id: a.probability for a in t.alternatives}
            assert shares.get(t.id, math.exp(t.logprob)) == math.exp(t.logprob)
            assert sum({**shares, t.id: math.exp(t.logprob)}.values()) <= 1
            assert [*shares.values()] == sorted(shares.values(), reverse=True)


def test_a_chat_a_question_and_an_empty_list():
    lm = talking()
    turn = [{"role": "user", "content": QUESTIONS[0]}]
    assert_same(lm.generate(turn, max_tokens=3), lm.generate(QUESTIONS[0], max_tokens=3))
    assert_same(lm.generate([turn], max_tokens=3)[0], lm.generate(QUESTIONS[0], max_tokens=3))
    assert lm.generate([]) == []


def test_stop_tokens_by_text_and_by_id():
    lm = talking()
    free = lm.generate(QUESTIONS[0], max_tokens=12)
    stop = next(t for t in free.tokens[3:] if t.id not in [u.id for u in free.tokens[:3]])
    ended = lm.generate(QUESTIONS[0], max_tokens=12, stop=[stop.id])
    assert ended.finish == "stop"
    assert [t.id for t in ended.tokens] == [t.id for t in free.tokens][: free.tokens.index(stop)]


@pytest.mark.parametrize("stop", [slice(4, 5), slice(2, 6), slice(5, 20)])
def test_a_stop_text_ends_an_answer_where_it_begins_though_tokens_are_cut_elsewhere(stop):
    lm = talking()
    free = lm.generate(QUESTIONS[0], max_tokens=12)
    text = free.text[stop]
    ended = lm.generate(QUESTIONS[0], max_tokens=12, stop=["never said", text])
    assert ended.finish == "stop"
    assert ended.text == free.text[: free.text.index(text)] == "".join(t.text for t in ended.tokens)
    stream = lm.stream(QUESTIONS[0], max_tokens=12, stop=[text])
    assert "".join(t.text for t in stream) == ended.text == stream.answer.text
    beside = lm.generate([QUESTIONS[1], QUESTIONS[0]], max_tokens=12, stop=[text])[1]
    assert_same(beside, ended)


def test_an_end_that_only_begins_a_stop_text_is_given():
    lm = talking()
    free = lm.generate(QUESTIONS[0], max_tokens=12)
    half = free.text[-2:] + "and what never comes"
    assert_same(lm.generate(QUESTIONS[0], max_tokens=12, stop=[half]), free)
    assert "".join(t.text for t in lm.stream(QUESTIONS[0], max_tokens=12, stop=[half])) == free.text


def test_a_stop_is_a_list_of_texts_that_say_something():
    lm = talking()
    with pytest.raises(ConfigError, match=r"^stop is a list of texts or token ids, got the text 'end'"):
        lm.generate(QUESTIONS[0], stop="end")
    with pytest.raises(ConfigError, match=r"^a stop text must not be empty"):
        lm.generate(QUESTIONS[0], stop=[""])


def test_candidates_come_least_risky_first():
    lm = talking(risk="mean_total")
    found = lm.candidates(QUESTIONS[0], 5, max_tokens=6, seed=2)
    assert [a.risk for a in found] == sorted(a.risk for a in found)
    alone = [lm.generate(QUESTIONS[0], max_tokens=6, temperature=1.0, seed=2 + i).text for i in range(5)]
    assert sorted(a.text for a in found) == sorted(alone)


def test_candidates_come_by_p_correct_where_there_is_one():
    plain = talking()
    drawn = Conditions.of_model(plain.model, made="sampled", temperature=1.0, cut=0)
    knots = ((0.0, 0.1), (9.0, 0.9))  # here the riskier is the better
    head = Calibration("isotonic", ("mean_total",), knots=knots, conditions=drawn)
    lm = RiskAwareLM(plain.model, plain.tokenizer, risk="mean_total", calibration=head)
    candidates = lm.candidates(QUESTIONS[0], 5, max_tokens=6, seed=2)
    numbers = [a.p_correct for a in candidates if a.p_correct is not None]
    assert len(numbers) == len(candidates)
    assert numbers == sorted(numbers, reverse=True)
    assert [a.risk for a in candidates] == sorted((a.risk for a in candidates), reverse=True)


def test_answering_again_until_confident():
    lm = talking(risk="mean_nll", reference={"mean_nll": [0.0, 1000.0]})
    surely = lm.generate_until(QUESTIONS[0], 0.5, max_tokens=4)
    assert (surely.attempts, surely.confident) == (1, True)
    never = lm.generate_until(QUESTIONS[0], 0.1, max_tries=3, max_tokens=4)
    assert (never.attempts, never.confident) == (3, False)
    tried = [lm.generate(QUESTIONS[0], max_tokens=4, temperature=1.0, seed=s).risk for s in range(3)]
    assert never.answer.risk == pytest.approx(min(tried), rel=1e-4)
    assert never.answer.percentile == 0.5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda lm: lm.generate(""), PromptError, "the question is empty"),
        (lambda lm: lm.generate(["Hi", " "]), PromptError, "the question is empty"),
        (lambda lm: lm.generate("word " * 300), PromptError, r"the prompt has \d+ tokens, .* at most 256"),
        (lambda lm: lm.score(" "), PromptError, "the text to score is empty"),
        (lambda lm: lm.score("word " * 300), PromptError, r"the prompt has \d+ tokens"),
        (lambda lm: lm.generate("Hi", max_tokens=0), ConfigError, "max_tokens must be at least 1, got 0"),
        (lambda lm: lm.generate("Hi", temperature=-1), ConfigError, "temperature .* got -1"),
        (lambda lm: lm.generate(["Hi"], batch_size=0), ConfigError, "batch_size must be at least 1, got 0"),
        (lambda lm: lm.candidates("Hi", 0), ConfigError, "candidates must be at least 1, got 0"),
        (lambda lm: lm.candidates("Hi", 2, temperature=0), ConfigError, "candidates at temperature 0"),
        (lambda lm: lm.generate_until("Hi", 2.0), ConfigError, r"percentile must be between 0 and 1, got 2\.0"),
        (lambda lm: lm.generate_until("Hi", 0.5), ConfigError, "needs reference answers, and this model has none"),
        (lambda lm: RiskAwareLM(lm.model, lm.tokenizer, risk="x"), ConfigError, "no answer score is called 'x'"),
    ],
)
def test_bad_input_gets_one_line(call, error, words):
    with pytest.raises(error) as found:
        call(talking())
    assert re.search(words, str(found.value))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_model_never_gives_a_risk(bad):
    lm = talking()
    lm.model.module.lm_head = torch.nn.Linear(16, len(tokenizer()), dtype=torch.float64)
    lm.model.module.lm_head.weight.data[7] = bad
    with pytest.raises(NonFiniteError):
        lm.generate("Hi")


untrained = pytest.mark.filterwarnings("ignore::selfdoubt.errors.UntrainedWarning")


@untrained
def test_loading_leaves_a_model_plain_unless_told(model_folder):
    assert not isinstance(RiskAwareLM.load(model_folder).model, selfdoubt.Wrapped)
    expected = replace(sample.Wrapper(**vars(WRAPPERS["sample"])), answer_from="base")
    assert RiskAwareLM.load(model_folder, wrapper=WRAPPERS["sample"]).model.spec == expected
    plain = RiskAwareLM.load(model_folder, wrapper=None)
    assert not isinstance(plain.model, selfdoubt.Wrapped)
    assert_same(plain.generate("Hi", max_tokens=5), talking(None).generate("Hi", max_tokens=5))


def test_an_adapter_brings_its_wrapper_and_its_reference(model_folder, tmp_path):
    model = WRAPPERS["vote"](talker())
    selfdoubt.save(model, tmp_path, extra={"reference": {"sum_nll": [0.0, 1000.0]}})
    lm = RiskAwareLM.load(model_folder, adapter=tmp_path)
    answer = lm.generate("Hi there", max_tokens=5)
    assert answer.percentile == 0.5
    assert answer.text == talking().generate("Hi there", max_tokens=5).text
    with pytest.raises(ConfigError, match=r"^an adapter brings its own wrapper"):
        RiskAwareLM.load(model_folder, adapter=tmp_path, wrapper=WRAPPERS["vote"])
    with pytest.raises(LoadError, match=r"is not an adapter folder"):
        RiskAwareLM.load(model_folder, adapter=tmp_path / "nowhere")


def published(stories):
    text = (stories / "stories260K.md").read_text(encoding="utf-8")
    return text.partition("-t 0.0\n")[2].partition("\n```")[0]


def test_a_wrapper_without_settings_is_said_before_anything_loads():
    with pytest.raises(ConfigError, match="wrapper must be one such as"):
        RiskAwareLM.load("pocket", wrapper=vote.Wrapper)


@untrained
def test_a_trained_model_tells_its_published_story_through_unchanged_voters(stories):
    lm = RiskAwareLM.load(stories, wrapper=vote.Wrapper(weight_noise=0.0, rank=4))
    # The first words are the greedy ones, too. Later the published sample takes the second of two close tokens.
    answer = lm.generate("Once upon a time", raw=True, max_tokens=170)
    told = "Once upon a time" + answer.text
    assert len(told) > 400
    assert published(stories).startswith(told)
    assert max(t.epistemic for t in answer.tokens) < 1e-5


@untrained
def test_batches_of_a_trained_model_are_its_answers_alone(stories):
    lm = RiskAwareLM.load(stories, wrapper=vote.Wrapper(n_voters=2, rank=4), dtype=torch.float64)
    starts = ["Once upon a time", "Lily", "The big dog was very sad because"]
    together = lm.generate(starts, raw=True, max_tokens=25)
    for answer, start in zip(together, starts, strict=True):
        assert_same(answer, lm.generate(start, raw=True, max_tokens=25))
        stream = lm.stream(start, raw=True, max_tokens=25)
        assert "".join(t.text for t in stream) == answer.text
        assert_same(stream.answer, answer)


@untrained
def test_familiar_text_surprises_a_trained_model_less(stories):
    lm = RiskAwareLM.load(stories, wrapper=vote.Wrapper(rank=4))
    story = lm.score("Once upon a time, there was a little girl named Lily.")
    noise = lm.score("Girl upon named a a Lily, time little. Once there was")
    assert story.scores["mean_nll"] + 1 < noise.scores["mean_nll"]


@pytest.mark.parametrize("name", [*WRAPPERS, None])
def test_texts_scored_side_by_side_are_what_each_is_alone(name):
    lm = talking(name)
    texts = ["It is Paris.", "No", "I do not know 😀, really"]
    pairs = [(q, t) for q in QUESTIONS for t in texts] + [(None, t) for t in texts]
    for (question, text), together in zip(pairs, lm.score_batch(pairs), strict=True):
        assert_same(together, lm.score(text, question))


@pytest.mark.parametrize("name", [*WRAPPERS, None])
def test_a_given_answer_is_scored_as_one_text_with_its_prompt(name):
    lm, text = talking(name), "It is Paris, I think."
    for question in QUESTIONS:
        ids = encode(lm.tokenizer, question).ids
        more = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        (scored,), _ = prefill(HFStepper(lm.model), [ids + more])
        found = lm.score(text, question)
        assert [t.id for t in found.tokens] == more
        expected = torch.tensor([t.logprob for t in scored[len(ids) :]])
        torch.testing.assert_close(torch.tensor([t.logprob for t in found.tokens]), expected, rtol=1e-4, atol=1e-5)


def test_each_prompt_of_a_list_may_have_its_own_seed():
    lm = talking()
    options = {"max_tokens": 8, "temperature": 1.5}
    found = lm.generate([QUESTIONS[0]] * 3 + QUESTIONS[:1], seeds=[5, 6, 5, 7], **options)
    for answer, seed in zip(found, (5, 6, 5, 7), strict=True):
        assert_same(answer, lm.generate(QUESTIONS[0], seed=seed, **options))
    with pytest.raises(ConfigError, match=r"^there must be one seed for each prompt, got 1 for 3$"):
        lm.generate(QUESTIONS, seeds=[1])
