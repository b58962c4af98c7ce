"""Members that are not rows of their own are found at the first call, and nothing else is refused or changed."""

import copy

import pytest
import torch
from torch import nn

from selfdoubt import density, sample, sculpt, vote
from selfdoubt.errors import WrapError
from selfdoubt.isolation import check_isolation

WIDTH = 8


class Positions(nn.Module):
    """Looks positions up that ``torch.arange`` alone does not give."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids
        self.positions = nn.Embedding(64, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.hidden(x + self.positions(self.ids(x.shape[1]))).relu().mean(1))


class Latents(nn.Module):
    """Asks the input with learned queries, as Perceiver does."""

    def __init__(self, length):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(length, WIDTH))
        self.query, self.key, self.head = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, 2))

    def forward(self, x):
        return self.head((self.query(self.latents) @ self.key(x).transpose(1, 2)).softmax(-1).matmul(x).mean(1))


class RelativePositions(nn.Module):
    """Adds a table of relative positions to attention, as T5 does."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(32, 1)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        ids = torch.arange(x.shape[1])
        bias = self.bias((ids - ids[:, None]).clamp(-15, 15) + 16)[..., 0]
        h = self.mix(x)
        return self.head(((h @ h.transpose(1, 2) + bias).softmax(-1) @ h).mean(1))


class OneByOne(nn.Module):
    """Reads one row at a time."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return torch.stack([self.head(self.hidden(row[None].mean(1)))[0] for row in x])


class TimeFirst(nn.Module):
    """Reads time first, and is given rows first."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0].mean(1))


def shifted(length):
    return torch.arange(length) + 2


def read_filter(error):
    """The filter that a message proposes."""
    return str(error.value).partition("param_filter=r'")[2].partition("' (")[0]


VOTERS = vote.Wrapper(n_voters=3)
MIXED = {
    "shifted": (VOTERS, Positions(shifted), (3, 24), "positions"),
    "flipped": (VOTERS, Positions(lambda length: torch.arange(length).flip(0)), (1, 16), "positions"),
    "the mean answers": (
        vote.Wrapper(n_voters=3, answer_from="mean"), Positions(shifted), (4, 12),
        "positions",
    ),
    "latents": (vote.Wrapper(n_voters=3, param_filter="query|key"), nn.Sequential(Latents(16)), (4, 12), "0.query"),
    "relative": (VOTERS, RelativePositions(), (3, 24), "bias"),
    "one by one": (VOTERS, OneByOne(), (4, 5), "hidden"),
    "one by one, samples": (sample.Wrapper(n_samples=3, answer_from="base"), OneByOne(), (4, 5), "head"),
    "time first": (sample.Wrapper(n_samples=3, answer_from="base"), TimeFirst(), (3, 24), "the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_mixed_members_are_an_error_that_names_the_layer(case):
    wrapper, model, shape, layer = MIXED[case]
    wrapped = wrapper(model)
    with pytest.raises(WrapError, match=rf"^{layer} (reads something else than rows|mixes the rows of a batch)"):
        wrapped.predict(torch.randn(*shape, WIDTH))


def test_the_repair_of_the_message_works():
    model, x = Positions(shifted), torch.randn(3, 24, WIDTH)
    with pytest.raises(WrapError) as error:
        VOTERS(model).predict(x)
    repair = read_filter(error)
    wrapped = vote.Wrapper(n_voters=3, param_filter=repair)(model)
    members = wrapped.forecast(x).members
    for voter in range(3):
        torch.testing.assert_close(members[voter], vote.merge_voter(wrapped, voter)(x))


def test_positions_of_t5_are_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64)
    encoder = transformers.T5EncoderModel(config)
    with pytest.raises(WrapError, match="relative_attention_bias reads"):
        VOTERS(encoder).predict(torch.randint(0, 50, (2, 16)))
    alone = vote.Wrapper(n_voters=3, param_filter=r"\.(q|k|v|o|wi|wo)\.")(encoder)
    ids = torch.randint(0, 50, (2, 16))
    members = alone.forecast(ids)["last_hidden_state"].members
    torch.testing.assert_close(members[1], vote.merge_voter(alone, 1)(ids)["last_hidden_state"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_members_are_found_mixed_in_any_precision(dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(3, 24, WIDTH, dtype=dtype)
    with pytest.raises(WrapError, match=r"^positions reads"):
        VOTERS(Positions(shifted).to(dtype)).predict(x)
    assert (VOTERS(Positions(torch.arange).to(dtype)).predict(x).risk > 0).all()


class Keeping(Positions):
    """Keeps an activation, which has a graph."""

    def forward(self, x):
        self.last = self.positions(self.ids(x.shape[1]))
        return super().forward(x + self.last)


class Forces(nn.Module):
    """Gives the gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = Positions(shifted)

    def forward(self, x):
        x = x if x.requires_grad else x.requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Ordered(Positions):
    """Reads times, which must not fall."""

    def forward(self, x):
        times = x.abs().cumsum(1)[..., :1]
        if (times.diff(dim=1) < 0).any():
            raise ValueError("times must not fall")
        return super().forward(times.expand(-1, -1, WIDTH))


class PartlyNumbers(Positions):
    """Gives NaN for some rows."""

    def forward(self, x):
        return (super().forward(x) + 0.3).sqrt()


class Complex(Positions):
    """Gives complex numbers."""

    def forward(self, x):
        y = super().forward(x)
        return torch.complex(torch.zeros_like(y), y)


@pytest.mark.parametrize("build", [Keeping, Ordered, Complex])
def test_no_habit_of_a_model_hides_mixed_members(build):
    torch.manual_seed(0)
    with pytest.raises(WrapError, match=r"^positions reads"):
        VOTERS(build(shifted)).forecast(torch.randn(3, 24, WIDTH))


def test_not_a_number_hides_no_mixed_members():
    torch.manual_seed(0)
    with pytest.raises(WrapError, match=r"^positions reads"):
        VOTERS(PartlyNumbers(shifted)).forecast(torch.randn(3, 24, WIDTH))


def test_gradients_inside_of_a_model_hide_no_mixed_members():
    with pytest.raises(WrapError, match=r"^energy\.positions reads"):
        VOTERS(Forces()).predict(torch.randn(3, 24, WIDTH))


def test_another_flag_is_another_kind_of_call():
    class Optional(Positions):
        def forward(self, x, placed=False):
            return super().forward(x) if placed else self.head(self.hidden(x).mean(1))

    wrapped, x = VOTERS(Optional(shifted)), torch.randn(3, 24, WIDTH)
    wrapped.predict(x)
    with pytest.raises(WrapError, match=r"^positions reads"):
        wrapped.predict(x, placed=True)


def test_outputs_that_libraries_collect_by_hooks_hide_no_mixed_members():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64)
    wrapped = VOTERS(transformers.T5EncoderModel(config))
    with pytest.raises(WrapError, match="relative_attention_bias reads"):
        wrapped.forecast(torch.randint(0, 50, (2, 16)), output_hidden_states=True)


def test_all_layers_are_named_at_once():
    class Two(Positions):
        def __init__(self):
            super().__init__(shifted)
            self.more = nn.Embedding(64, WIDTH)

        def forward(self, x):
            return super().forward(x + self.more(self.ids(x.shape[1])))

    x = torch.randn(3, 24, WIDTH)
    with pytest.raises(WrapError, match=r"^positions, more read something .*\(\?!\(positions\|more\)") as error:
        VOTERS(Two()).predict(x)
    repair = read_filter(error)
    vote.Wrapper(n_voters=3, param_filter=repair)(Two()).predict(x)


def test_odd_names_are_left_out_too():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleDict({"c++": nn.Embedding(64, WIDTH)})
            self.hidden = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.hidden(x + self.tables["c++"](shifted(x.shape[1]))).mean(1)

    x = torch.randn(3, 24, WIDTH)
    with pytest.raises(WrapError) as error:
        VOTERS(Table()).predict(x)
    repair = read_filter(error)
    vote.Wrapper(n_voters=3, param_filter=repair)(Table()).predict(x)


def test_rows_that_a_model_mixes_behind_its_layers():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x):
            h = self.hidden(x).relu()
            return self.head(h - h.mean(0))

    x = torch.randn(5, WIDTH)
    with pytest.raises(WrapError, match=r"^hidden reads something else than rows, or what follows mixes the rows"):
        VOTERS(Centred()).predict(x)
    wrapped = vote.Wrapper(n_voters=3, param_filter="head")(Centred())
    torch.testing.assert_close(wrapped.forecast(x).members[1], vote.merge_voter(wrapped, 1)(x))
    allowed = VOTERS(Centred())
    allowed.tests_members = False
    assert allowed.predict(x).risk.shape == (5, 2)


class Windows(nn.Module):
    """Folds windows into the rows, as Swin does."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        windows = self.inside(x.reshape(-1, x.shape[1] // 4, WIDTH)).relu()
        return self.head(windows.reshape(x.shape).mean(1))


class Noisy(nn.Module):
    """Is never the same twice."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(x + torch.rand(len(x), 1, WIDTH)).mean(1) + torch.rand(())


class Refusing(nn.Module):
    """Checks its features, which a test run disturbs."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = self.hidden(x).tanh()
        if (self.head(h) > 4).any():
            raise ValueError("out of range")
        return self.head(h).mean(1)


class Stacked(nn.Module):
    """Returns the outputs of all layers as well, layers first."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5)), nn.Linear(WIDTH, 2)

    def forward(self, x):
        hidden = []
        for layer in self.layers:
            x = x + layer(x).relu()
            hidden.append(x)
        return self.head(x).mean(1), torch.stack(hidden)


class Normed(nn.Module):
    """Takes statistics of the batch from its inputs, which are the same for all members."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.hidden((x - x.mean(0)) / x.abs().amax()).relu()).mean(1)


class Scaled(nn.Module):
    """Has a parameter of its own and layers inside."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ x * self.scale


class Nested(nn.Module):
    """Has a layer with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.mixer, self.head = nn.Linear(WIDTH, WIDTH), Scaled(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.mixer(self.first(x)).mean(1))


class Walking(nn.Module):
    """Goes on where the call before has ended, up to the end of its table."""

    def __init__(self):
        super().__init__()
        self.table, self.head, self.position = torch.randn(17, WIDTH), nn.Linear(WIDTH, 2), 0

    def forward(self, x):
        ids = torch.arange(self.position, self.position + x.shape[1])
        self.position += x.shape[1]
        return self.head((x + self.table[ids]).tanh()).mean(1)


@pytest.mark.parametrize(
    "model",
    [Windows, Noisy, Refusing, Stacked, Normed, Nested, Walking, lambda: Positions(torch.arange)],
)
@pytest.mark.parametrize("wrapper", [VOTERS, sample.Wrapper(n_samples=3, answer_from="base")])
@pytest.mark.parametrize("shape", [(4, 12), (1, 4), (2, 16)])
def test_other_models_are_not_refused(model, wrapper, shape):
    risk = wrapper(model()).predict(torch.randn(*shape, WIDTH)).risk
    assert ((risk[0] if isinstance(risk, tuple) else risk) > 0).any()


@pytest.mark.parametrize("seed", range(30))
def test_dropout_that_stays_on_is_no_alarm(seed):
    torch.manual_seed(seed)
    wrapped = VOTERS(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.ReLU(), nn.Linear(WIDTH, 2)))
    wrapped.module[1].train()
    wrapped.predict(torch.randn(1, WIDTH))


class Buffered(nn.Module):
    """Writes keys to a large buffer, as static caches do."""

    def __init__(self):
        super().__init__()
        self.key, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("cache", torch.zeros(40, 4096, WIDTH))

    def forward(self, x, start):
        end = start + x.shape[1]
        self.cache[: len(x), start:end] = self.key(x)
        return self.head(x + self.cache[: len(x), :end].mean(1, keepdim=True)).mean(1)


def test_a_large_buffer_is_not_written_to():
    answers = []
    for tests_members in (True, False):
        torch.manual_seed(0)
        wrapped = VOTERS(Buffered())
        wrapped.tests_members = tests_members
        with torch.no_grad():
            wrapped.predict(torch.ones(2, 3, WIDTH), 0)
            answers.append(wrapped.predict(torch.ones(2, 1, WIDTH), 3).mean)
    assert torch.equal(*answers)


def test_members_are_found_mixed_in_training():
    wrapped = VOTERS(Positions(shifted)).train()
    with pytest.raises(WrapError, match=r"^positions reads"):
        wrapped(torch.randn(12, 24, WIDTH))


@pytest.mark.parametrize("model", [Windows, Noisy, Normed, lambda: nn.Sequential(Windows(), nn.Dropout(0.3))])
def test_training_goes_on_as_without_the_test(model):
    base, x = model(), torch.randn(12, 12, WIDTH)
    losses = []
    for tests_members in (True, False):
        torch.manual_seed(0)
        wrapped = VOTERS(copy.deepcopy(base)).train()
        wrapped.tests_members = tests_members
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = wrapped(x.clone()).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert torch.equal(*losses)


def test_transforms_of_functions_go_on():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    wrapped, x = VOTERS(model), torch.randn(5, 6, WIDTH)
    assert torch.func.vmap(lambda rows: wrapped(rows, training=True), randomness="same")(x).shape == (5, 6, 2)
    assert torch.func.vmap(lambda rows: wrapped.forecast(rows).members, randomness="same")(x).shape == (5, 3, 6, 2)
    p = dict(wrapped.named_parameters())

    def loss(p, rows):
        return torch.func.functional_call(wrapped, p, (rows,), {"training": True}).sum()

    assert torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x).keys() == p.keys()


def test_inputs_that_a_model_changes_are_changed_once():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(x.mul_(2))

    wrapped, x = VOTERS(Doubling()).train(), torch.ones(6, WIDTH)
    wrapped(x)
    assert torch.equal(x, torch.full((6, WIDTH), 2.0))


class Counting(nn.Module):
    """Has state of every kind, all of which a call changes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)
        self.calls = 0
        self.seen = []
        self.register_buffer("sum", torch.zeros(WIDTH))

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.sum += x.sum((0, 1))
        return self.head(x).mean(1)


def test_a_test_run_leaves_no_trace():
    wrapped, x = VOTERS(Counting()), torch.randn(4, 12, WIDTH)
    features = []
    wrapped.get_submodule("module.head").leaf.register_forward_hook(lambda *_: features.append(1))
    torch.manual_seed(3)
    wrapped.predict(x)
    drawn = torch.rand(2)
    model = wrapped.module
    assert [model.calls, model.seen, len(features)] == [1, [16], 1]
    torch.testing.assert_close(model.sum, 4 * x.sum((0, 1)))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


def count_runs(monkeypatch):
    runs = []

    def run(*args, **settings):
        runs.append(1)
        check_isolation(*args, **settings)

    monkeypatch.setattr("selfdoubt.members.check_isolation", run)
    return runs


def test_each_shape_is_tested_once(monkeypatch):
    wrapped = VOTERS(Windows())
    runs = count_runs(monkeypatch)
    for shape in ((4, 12), (4, 12), (2, 12), (4, 12)):
        wrapped.predict(torch.randn(*shape, WIDTH))
    assert len(runs) == 2
    copy.deepcopy(wrapped).predict(torch.randn(4, 12, WIDTH))
    assert len(runs) == 2


def test_after_many_shapes_only_those_are_tested_that_could_mix(monkeypatch):
    wrapped = VOTERS(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)))
    runs = count_runs(monkeypatch)
    for length in range(17, 60):
        wrapped.predict(torch.randn(4, length, WIDTH))
    before = len(runs)
    assert before == 16
    wrapped.predict(torch.randn(4, 16, WIDTH))  # as long as the base and three voters have rows
    wrapped.predict(torch.randn(5, 18, WIDTH))  # a number of rows that is new
    wrapped.predict(torch.randn(4, 99, WIDTH))
    assert len(runs) == before + 2


def test_calls_that_cannot_be_repeated_are_not(monkeypatch):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x, cache):
            cache.append(x)
            return self.head(x)

    class Cache:
        def __init__(self):
            self.entries = []

        def append(self, x):
            self.entries.append(x)

    wrapped, cache = VOTERS(Cached()), Cache()
    runs = count_runs(monkeypatch)
    wrapped.predict(torch.randn(4, WIDTH), cache)
    assert len(cache.entries) == 1
    assert not runs


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: VOTERS(sample.Wrapper(n_samples=2)(sculpt.Wrapper()(model))),
        lambda model: VOTERS(density.Wrapper()(model)),
        lambda model: sample.Wrapper(n_samples=3, answer_from="base")(sculpt.Wrapper()(model)),
    ],
)
def test_wrappers_inside_of_one_another_are_tested(wrap):
    wrapped = wrap(Windows())
    assert (wrapped.predict(torch.randn(4, 12, WIDTH)).risk > 0).all()
    with pytest.raises(WrapError, match=r"^(module\.positions|module\.module\.positions|the model) "):
        wrap(TimeFirst() if wrapped.spec is not VOTERS else Positions(lambda n: torch.arange(n) + 2)).predict(
            torch.randn(1, 56, WIDTH)
        )


def test_a_gradient_reaches_what_trains_through_the_first_call():
    wrapped = VOTERS(Windows())
    wrapped.forecast(torch.randn(4, 12, WIDTH)).members.sum().backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
