"""Rows, structures of inputs and outputs, and what the original model keeps."""

from __future__ import annotations

import copy
import io
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

import selfdoubt
from selfdoubt import messages, sample, sculpt, vote
from selfdoubt.errors import ConfigError, ShapeError, WrapError
from selfdoubt.forecast import Forecast
from selfdoubt.rows import expand, unfold
from selfdoubt.spec import check_spec
from selfdoubt.wrapping import get_base_name, innermost
from tests.ladder.rungs import voter
from tests.zoo import Pair, Structured, causal, cnn, encoder, mlp, prompts

VOTE = vote.Wrapper(n_voters=3, weight_noise=0.5, answer_from="mean")
WRAPPERS = {"vote": VOTE, "sample": sample.Wrapper(n_samples=4, answer_from="mean"), "sculpt": sculpt.Wrapper()}


def test_rows_are_member_major():
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(expand(x, 3), torch.cat([x, x, x]))
    assert torch.equal(unfold(expand(x, 3), 3)[1], x)


def test_rows_that_do_not_divide():
    with pytest.raises(ShapeError, match=r"^the rows must be a multiple of the 3 members, got 4 rows; .*eval\(\)"):
        unfold(torch.ones(4, 2), 3)


def test_an_ensemble_against_torch_func():
    x, base = torch.randn(5, 4, dtype=torch.float64), mlp(4, 16, 16, 3)
    wrapped = VOTE(base)
    voters = [voter(wrapped, base, m) for m in range(3)]
    parameters, buffers = stack_module_state(voters)
    expected = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    found = wrapped.forecast(x)
    assert_close(found.members, expected)
    assert_close(found.mean, expected.mean(0))
    assert_close(found.std, expected.std(0, correction=0))


def test_voters_on_a_convolutional_network():
    x, base = torch.randn(2, 3, 5, 5, dtype=torch.float64), cnn()
    wrapped = VOTE(base)
    assert_close(wrapped.forecast(x).members, torch.stack([voter(wrapped, base, m)(x) for m in range(3)]))


ENCODED = {
    "bert": lambda batch: {"input_ids": torch.tensor(prompts(*[6] * batch))},
    "vit": lambda batch: {"pixel_values": torch.randn(batch, 3, 8, 8, dtype=torch.float64)},
}


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("pattern", [None, "."])
@pytest.mark.parametrize("kind", ENCODED)
def test_voters_on_encoders_of_texts_and_images(kind, pattern, batch):
    # A text's positions are one line for all rows; an image's embedding owns a parameter and holds other leaves.
    base, inputs = encoder(kind), ENCODED[kind](batch)
    wrapped = vote.Wrapper(n_voters=3, param_filter=pattern, weight_noise=0.5)(base)
    with torch.no_grad():
        expected = torch.stack([voter(wrapped, base, m)(**inputs).logits for m in range(3)])
        assert_close(wrapped.forecast(**inputs)["logits"].members, expected)


@pytest.mark.parametrize("kind", ENCODED)
def test_samples_of_encoders_do_not_depend_on_the_batch(kind):
    inputs = ENCODED[kind](4)
    wrapped = sample.Wrapper(n_samples=3, param_filter=".")(encoder(kind))
    with torch.no_grad():
        whole = wrapped.forecast(**inputs)["logits"].members
        parts = [wrapped.forecast(**{k: v[i : i + 1] for k, v in inputs.items()})["logits"].members for i in range(4)]
    assert_close(whole, torch.cat(parts, 1))
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_a_leaf_inside_another_is_still_reached_by_noise():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8))
            self.inner = nn.Linear(8, 8, bias=False)
            nn.init.eye_(self.inner.weight)

        def forward(self, x):
            return self.inner(x) + self.shift

    wrapper = sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.5), param_filter=".*")
    wrapped = wrapper(nn.Sequential(Outer()).eval())
    assert wrapped.leaf_names == ["0", "0.inner"]
    found = wrapped.forecast(torch.ones(1, 8)).members
    assert set(found.unique().tolist()) == {0.0, 4.0}  # kept twice, dropped once or twice


def test_positional_and_keyword_inputs_are_the_same():
    wrapped, ids = VOTE(causal("llama")), torch.tensor(prompts(5, 5))
    assert torch.equal(wrapped(ids).logits, wrapped(input_ids=ids).logits)


def structured(x, **more):
    return Structured().eval(), (x, {"shift": torch.ones(4, dtype=torch.float64), "note": "kept"}), more


def test_names_in_a_wrapped_model_lead_back_to_the_base():
    base = causal("llama")
    wrapped = vote.Wrapper(n_voters=2, rank=2, param_filter=r"v_proj|lm_head\.leaf")(sculpt.Wrapper()(base))
    names = {get_base_name(wrapped, n) for n in wrapped.state_dict() if ".deviations." not in n and ".branch." not in n}
    assert names == set(base.state_dict())
    assert get_base_name(wrapped, "module.module.lm_head.leaf.leaf.weight") == "lm_head.weight"
    assert innermost(wrapped) is wrapped.module.module
    inner = nn.ModuleDict({"module": nn.ModuleDict({"leaf": mlp()})})  # names of its own stay
    noisy = sample.Wrapper()(inner)
    assert {get_base_name(noisy, n) for n, _ in noisy.named_parameters()} == {n for n, _ in inner.named_parameters()}


def test_nested_inputs_and_outputs_keep_their_structure():
    x = torch.randn(5, 4, dtype=torch.float64)
    base, args, kwargs = structured(x, scale=torch.randn(5, 3, dtype=torch.float64))
    wrapped = VOTE(base)
    y, risk = wrapped(*args, return_risk=True, **kwargs)
    alone = [voter(wrapped, base, m)(*args, **kwargs) for m in range(3)]
    for tree in (y, risk):
        assert list(tree) == ["pair", "list", "steps", "constant"]
        assert isinstance(tree["pair"], Pair)
        assert isinstance(tree["list"], list)
    masks = torch.stack([a["pair"].mask for a in alone])
    assert_close(y["pair"].mask, masks.mean(0))
    assert_close(risk["pair"].mask, masks.std(0, correction=0))
    assert_close(y["list"][0], torch.stack([a["list"][0] for a in alone]).mean(0))
    # Flags: the vote of the majority, and the share that differs.
    flags = torch.stack([a["pair"].flags for a in alone])
    assert torch.equal(y["pair"].flags, flags.sum(0) >= 2)
    assert_close(risk["pair"].flags, (flags != y["pair"].flags).float().mean(0))
    # What is no tensor with a batch axis stays as it is, and has no risk.
    assert y["steps"] == 2
    assert torch.equal(y["constant"], torch.ones(11))
    assert risk["steps"] is risk["constant"] is risk["list"][1] is None


def test_hugging_face_outputs_stay_hugging_face_outputs():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return BaseModelOutput(last_hidden_state=self.layer(x), hidden_states=(x, 2 * x))

    x = torch.randn(5, 4)
    y, risk = VOTE(Encoder().eval())(x, return_risk=True)
    assert isinstance(y, BaseModelOutput)
    assert isinstance(risk, BaseModelOutput)
    assert risk.last_hidden_state.shape == (5, 2)
    assert_close(y.hidden_states[1], 2 * x)
    assert_close(risk.hidden_states[1], torch.zeros(5, 4))


@pytest.mark.parametrize("kind", ["language-model", "logits", "values"])
def test_logits_average_probabilities_and_values_average_values(kind):
    if kind == "language-model":
        wrapped, x = VOTE(causal("llama")), torch.tensor(prompts(4, 4))
        members, mean = wrapped.forecast(x)["logits"].members, wrapped(x).logits
    else:
        x = torch.randn(5, 4, dtype=torch.float64)
        wrapped = vote.Wrapper(n_voters=3, weight_noise=2.0, output=kind, answer_from="mean")(mlp())
        members, mean = wrapped.forecast(x).members, wrapped(x)
    if kind == "values":
        assert_close(mean, members.mean(0))
    else:
        assert_close(mean.softmax(-1), members.softmax(-1).mean(0))
        assert (mean.softmax(-1) - members.mean(0).softmax(-1)).abs().max() > 1e-4


class Masked(nn.Module):
    """Takes a table as long as the batch that is no batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x, table):
        return self.layer(x) @ table


def test_an_input_that_only_looks_like_a_batch_is_named_as_shared():
    x, table = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    base = Masked().eval()
    wrapped = vote.Wrapper(n_voters=3, shared_inputs=("table",))(base)
    expected = torch.stack([voter(wrapped, base, m)(x, table) for m in range(3)])
    assert_close(wrapped.forecast(x, table).members, expected)
    assert_close(wrapped.forecast(x, table=table).members, expected)
    with pytest.raises(RuntimeError):
        vote.Wrapper(n_voters=3)(base).predict(x, table)


def test_an_unknown_shared_input_is_an_error():
    wrapped = vote.Wrapper(shared_inputs=("tabel",))(Masked().eval())
    with pytest.raises(ConfigError, match=r"^shared_inputs names \['tabel'\], and the inputs are \['x', 'table'\]$"):
        wrapped(torch.ones(2, 2), torch.ones(2, 2))


def test_no_tensor_with_a_batch_axis_is_an_error():
    with pytest.raises(ShapeError, match=r"got input: Tensor$"):
        VOTE(mlp())(torch.tensor(1.0))


def test_in_training_each_voter_reads_its_share_of_the_batch():
    base, x = mlp(), torch.randn(6, 4, dtype=torch.float64)
    wrapped = VOTE(base)
    found = wrapped(x, training=True)
    assert_close(found, torch.cat([voter(wrapped, base, m)(x[2 * m : 2 * m + 2]) for m in range(3)]))
    assert torch.equal(wrapped.train()(x), found)  # training=None follows the module


def test_a_training_batch_that_does_not_divide():
    with pytest.raises(ShapeError) as error:
        VOTE(mlp())(torch.ones(4, 4, dtype=torch.float64), training=True)
    text = str(error.value)
    assert "split over the 3 members" in text
    assert "4 rows" in text
    assert "multiple of 3" in text
    assert "\n" not in text


def test_no_disagreement_in_training():
    with pytest.raises(ConfigError, match=r"so members cannot disagree; .*training=False, or call \.eval\(\)$"):
        VOTE(mlp())(torch.ones(3, 4, dtype=torch.float64), training=True, return_risk=True)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_original_model_is_untouched(name):
    base, x = mlp(), torch.randn(6, 4, dtype=torch.float64)
    modules, before, state = list(base.modules()), base(x), copy.deepcopy(base.state_dict())
    wrapped = WRAPPERS[name](base)
    wrapped(x, training=True).sum().backward()
    wrapped.train()
    assert list(base.modules()) == modules
    assert not base.training
    assert all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), base.state_dict().values(), strict=True))
    assert torch.equal(base(x), before)


def test_frozen_weights_are_shared_and_not_copied():
    base = causal("llama")
    wrapped = VOTE(base)
    addresses = {p.data_ptr() for p in base.parameters()}
    assert all(p.data_ptr() in addresses for n, p in wrapped.named_parameters() if "deviations" not in n)


def test_only_deviations_train_when_finetuning():
    wrapped = VOTE(mlp())
    training = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert training == {f"module.{i}.deviations.{p}" for i in (0, 2) for p in ("weight", "bias")}


def test_parameters_are_there_before_the_first_call():
    for spec in WRAPPERS.values():
        wrapped = spec(mlp())
        before = {n: p.shape for n, p in wrapped.state_dict().items()}
        wrapped(torch.ones(3, 4, dtype=torch.float64))
        assert before == {n: p.shape for n, p in wrapped.state_dict().items()}
        again = spec(mlp())
        again.load_state_dict(wrapped.state_dict(), strict=True)


def test_attributes_of_a_leaf_are_still_there():
    wrapped = VOTE(mlp())
    assert wrapped.module[0].in_features == 4
    assert wrapped.module[0].weight.shape == (8, 4)
    with pytest.raises(AttributeError):
        wrapped.module[0].nonsense  # noqa: B018


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_decorated_class_builds_wrapped_models(name):
    @WRAPPERS[name]
    class Net(nn.Module):
        """A network."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(4, width)
            self.last = nn.Linear(width, 2)

        def forward(self, x):
            return self.last(self.first(x).relu())

    net = Net(width=8).eval()
    y, risk = net(torch.ones(3, 4), return_risk=True)
    assert y.shape == risk.shape == (3, 2)
    assert Net.__doc__ == "A network."


@pytest.mark.parametrize("thing", [3, "model", int, lambda x: x])
def test_only_modules_can_be_wrapped(thing):
    with pytest.raises(WrapError, match=r"^only an nn\.Module, or a class of them"):
        VOTE(thing)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [("vote", "vote"), ("vote", "sample"), ("vote", "sculpt"), ("sample", "sample"), ("sculpt", "sculpt")],
)
def test_wrappers_in_an_order_that_cannot_be_are_refused(inner, outer):
    with pytest.raises(WrapError, match=r"the order is vote\.Wrapper\(\.\.\.\)\(sample\.Wrapper.* each once$"):
        WRAPPERS[outer](WRAPPERS[inner](mlp()))


def test_batchnorm_in_training_mode_would_mix_members():
    base, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(), torch.randn(3, 4)
    wrapped = vote.Wrapper(n_voters=3, finetune=False)(base)
    with pytest.raises(WrapError, match=r"^BatchNorm in training mode .* 3 members; call \.eval\(\)"):
        wrapped.train()(x)
    assert wrapped.eval()(x).shape == (3, 3)


def test_batchnorm_of_a_frozen_model_only_evaluates():
    base, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()).train(), torch.randn(3, 4)
    before = copy.deepcopy(base[1].state_dict())
    wrapped = VOTE(sculpt.Wrapper(param_filter="0")(base))
    outer = nn.Sequential(wrapped).train()  # as a training loop has it
    assert (wrapped.training, base[1].training) == (True, True)
    outer(x).sum().backward()
    modes = {type(m).__name__: m.training for m in wrapped.modules()}
    assert (modes["BatchNorm1d"], modes["Dropout"]) == (False, True)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), base[1].state_dict().values(), strict=True))
    wrapped.module.module[1].train()  # said by hand
    with pytest.raises(WrapError, match=r"^BatchNorm in training mode"):
        outer(x)


def test_a_leaf_that_is_never_called_is_an_error():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return x @ self.layer.weight.T

    with pytest.raises(WrapError, match=r"^none of the 1 replaced leaves was called \(layer, \.\.\.\)"):
        VOTE(Reads())(torch.ones(3, 4))


def test_a_model_that_cannot_be_copied_says_why():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.source = (i for i in range(3))

    with pytest.raises(WrapError, match=r"^the structure of Locked cannot be copied: "):
        VOTE(Locked())


TRAINED = 2 * (4 * 8 + 8 + 8 * 3 + 3)
SUMMARY = f"vote: 2 leaves replaced, {TRAINED} of {TRAINED * 3 // 2} parameters train"


@contextmanager
def fresh_logging():
    """Give the logging of a program that has not set it up; pytest has."""
    root, log = logging.getLogger(), messages.log
    before = root.handlers, log.handlers, log.level
    root.handlers, log.handlers = [], []
    log.setLevel(logging.NOTSET)
    try:
        yield root
    finally:
        root.handlers, log.handlers = before[:2]
        log.setLevel(before[2])


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (1, 1), (2, 5)])
def test_verbose_prints_the_matched_parameters_where_no_logging_is_set_up(capsys, verbose, lines):
    with fresh_logging():
        for _ in range(2):  # a second message is not printed twice
            vote.Wrapper(n_voters=2, verbose=verbose)(mlp())
            out = capsys.readouterr().out.splitlines()
            assert len(out) == lines
            assert out[:1] == [SUMMARY] * bool(verbose)
            assert [name.strip() for name in out[1:2]] == ["0.weight"] * (verbose > 1)


def test_verbose_goes_to_the_handlers_of_a_program_that_has_some(capsys):
    with fresh_logging() as root:
        vote.Wrapper(n_voters=2, verbose=1)(mlp())  # printed: the program sets up logging afterwards
        assert capsys.readouterr().out == SUMMARY + "\n"
        stream = io.StringIO()
        root.addHandler(logging.StreamHandler(stream))
        vote.Wrapper(n_voters=2, verbose=1)(mlp())
    assert stream.getvalue() == SUMMARY + "\n"
    assert capsys.readouterr().out == ""


def test_a_level_of_the_logger_silences_verbose(capsys):
    with fresh_logging():
        messages.log.setLevel(logging.WARNING)
        vote.Wrapper(n_voters=2, verbose=2)(mlp())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrapper", [vote.Wrapper, sample.Wrapper, sculpt.Wrapper])
def test_compile_and_symbolic_trace_are_one_setting(wrapper):
    assert wrapper().compile is wrapper(symbolic_trace=False).compile is False
    assert wrapper(symbolic_trace=True) == wrapper(compile=True) == wrapper(compile=True, symbolic_trace=True)
    assert replace(wrapper(), compile=True).compile is True
    for one in (True, False):
        with pytest.raises(ConfigError, match=r"^compile and symbolic_trace are one setting .*; give compile alone$"):
            wrapper(compile=one, symbolic_trace=not one)


@pytest.mark.parametrize("name", [*WRAPPERS, "both"])
def test_a_copy_of_a_wrapped_model_stands_alone(name):
    x = torch.randn(6, 4, dtype=torch.float64)
    wrapped = VOTE(sculpt.Wrapper()(mlp())) if name == "both" else WRAPPERS[name](mlp())
    wrapped(x, training=True).sum().backward()
    twin = copy.deepcopy(wrapped)
    expected = wrapped(x, return_risk=True)
    assert all(torch.equal(a, b) for a, b in zip(twin(x, return_risk=True), expected, strict=True))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(wrapped(x, return_risk=True), expected, strict=True))


def test_printing_a_wrapped_model_shows_its_settings():
    assert "n_voters=3" in repr(VOTE(mlp()))


@pytest.mark.parametrize("wrapper", [vote.Wrapper(1, answer_from="mean"), sample.Wrapper(1, answer_from="mean")])
def test_one_member_alone_has_no_risk(wrapper):
    y, risk = wrapper(mlp())(torch.ones(2, 4, dtype=torch.float64), return_risk=True)
    assert y.shape == (2, 3)
    assert risk is None


def test_public_names_are_the_ones_used_here():
    assert selfdoubt.Forecast is Forecast


@pytest.mark.parametrize("wrong", ["none", 3, vote.Wrapper, nn.Linear(1, 1)])
def test_what_is_no_wrapper_is_said(wrong):
    with pytest.raises(ConfigError, match=r"wrapper must be one such as .*, got "):
        check_spec(wrong)
    check_spec(vote.Wrapper())


@pytest.mark.parametrize(
    "wrapper", [vote.Wrapper(weight_noise=0.5), sample.Wrapper(distribution=sample.Normal(0.5), param_filter=".*")]
)
def test_an_embedding_of_positions_that_no_row_owns_has_members(wrapper):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 2)
            self.by_list: Any = False

        def forward(self, ids):
            places = torch.arange(ids.shape[1]) if self.by_list else torch.arange(ids.shape[1]).expand_as(ids)
            return self.head((self.words(ids) + self.places(places)).mean(1))

    torch.manual_seed(0)
    model, ids = Reader(), torch.randint(9, (2, 5))
    expected = wrapper(model).forecast(ids).members
    model.by_list = True
    members = wrapper(model).forecast(ids).members
    assert torch.equal(members, expected)
    assert not torch.equal(members[0], members[1])
