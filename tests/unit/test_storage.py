"""What is written, what comes back, and what broken or foreign folders get."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import selfdoubt
from selfdoubt import density, sample, sculpt, storage, vote
from selfdoubt.errors import BaseMismatchError, LoadError, WrapError
from tests.plain import run
from tests.zoo import causal, cnn, mlp, prompts

WRAPPERS = {
    "vote": lambda model: vote.Wrapper(n_voters=2, weight_noise=0.5)(model),
    "vote-low-rank": lambda model: vote.Wrapper(n_voters=2, rank=2)(model),
    "vote-anew": lambda model: vote.Wrapper(n_voters=2, finetune=False, param_filter="weight")(model),
    "sample": lambda model: sample.Wrapper(n_samples=3, distribution=sample.Normal(0.4))(model),
    "sample-trainable": lambda model: sample.Wrapper(distribution=sample.Bernoulli(0.2, trainable=True))(model),
    "sculpt": lambda model: sculpt.Wrapper(distribution=sculpt.Laplace, rank=3)(model),
    "vote-sculpt": lambda model: vote.Wrapper(n_voters=2)(sculpt.Wrapper()(model)),
    "sample-sculpt": lambda model: sample.Wrapper(n_samples=2)(sculpt.Wrapper()(model)),
    "vote-base": lambda model: vote.Wrapper(n_voters=2, antithetic=True, answer_from="base")(model),
    "sample-base": lambda model: sample.Wrapper(n_samples=2, answer_from="base")(model),
}
MODELS = {"mlp": mlp, "cnn": cnn, "llama": lambda: causal("llama")}
INPUTS = {
    "mlp": torch.randn(4, 4, dtype=torch.float64),
    "cnn": torch.randn(4, 3, 5, 5, dtype=torch.float64),
    "llama": torch.tensor(prompts(5, 5)),
}


@torch.no_grad()
def shaken(wrapped):
    """The same, as if it had been trained."""
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    return wrapped


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_loaded_gives_what_was_saved(tmp_path, name, model):
    base = copy.deepcopy(MODELS[model]())
    untouched = copy.deepcopy(base)
    wrapped = shaken(WRAPPERS[name](base))
    folder = selfdoubt.save(wrapped, tmp_path / "made" / "here", base="me/base", extra={"reference": {"a": [1.0]}})
    again = selfdoubt.load(folder, untouched)
    assert again.spec == wrapped.spec
    found, expected = (w.eval()(INPUTS[model], return_risk=True) for w in (again, wrapped))
    if model == "llama":
        found, expected = ([part.logits for part in pair] for pair in (found, expected))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    manifest = storage.read_manifest(folder)
    assert manifest["base"]["name"] == "me/base"
    assert manifest["reference"] == {"a": [1.0]}
    assert sorted(f.name for f in folder.iterdir()) == ["added.safetensors", "selfdoubt.json"]


@pytest.mark.parametrize("spec", [vote.Wrapper(n_voters=2), sample.Wrapper(n_samples=2)], ids=["vote", "sample"])
def test_a_manifest_of_an_earlier_version_means_what_it_meant(tmp_path, spec):
    base, x = mlp(), INPUTS["mlp"]
    wrapped = shaken(spec(base))
    selfdoubt.save(wrapped, tmp_path)
    manifest = json.loads((tmp_path / "selfdoubt.json").read_text())
    for name in ("answer_from", "antithetic"):
        manifest["wrappers"][0].pop(name, None)
    del manifest["checksums"], manifest["trained"]
    (tmp_path / "selfdoubt.json").write_text(json.dumps(manifest))
    again = selfdoubt.load(tmp_path, base)
    wrapped.is_trained = True  # as all were
    assert again.spec == spec
    assert torch.equal(again(x, training=False), wrapped(x, training=False))
    assert again.forecast(x).base is None


@pytest.mark.parametrize("method", ["sample", "density"])
def test_adapters_with_the_layers_of_earlier_defaults_load(tmp_path, method):
    base, x = mlp(4, 8, 8, 3), INPUTS["mlp"]
    base.pop(3)  # the head comes right after a linear layer
    if method == "sample":
        wrapped = sample.Wrapper(param_filter=".*")(base)
    else:
        wrapped = density.Wrapper(param_filter=r"^3\.")(base)
        density.fit(wrapped, [torch.randn(50, 4, dtype=torch.float64)])
    selfdoubt.save(wrapped, tmp_path)
    manifest = json.loads((tmp_path / "selfdoubt.json").read_text())
    manifest["wrappers"][0]["param_filter"] = None
    del manifest["checksums"]
    (tmp_path / "selfdoubt.json").write_text(json.dumps(manifest))
    again = selfdoubt.load(tmp_path, base)
    assert torch.equal(again.predict(x).risk, wrapped.predict(x).risk)
    assert again.leaf_names == wrapped.leaf_names


def test_only_what_was_added_is_written(tmp_path):
    wrapped = vote.Wrapper(n_voters=3, rank=2)(causal("llama"))
    folder = selfdoubt.save(wrapped, tmp_path)
    tensors = load_file(folder / "added.safetensors")
    assert set(tensors) == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert (folder / "added.safetensors").stat().st_size < 60_000
    assert {n.rsplit(".", 1)[1] for n in tensors} == {"weight_a", "weight_b"}


def test_a_frozen_base_in_another_float_type_still_fits(tmp_path):
    folder = selfdoubt.save(vote.Wrapper(rank=2)(causal("llama")), tmp_path)
    again = selfdoubt.load(folder, copy.deepcopy(causal("llama")).to(torch.bfloat16))
    assert again(torch.tensor(prompts(3))).logits.isfinite().all()


@pytest.mark.parametrize("change", [lambda w: -w, lambda w: w.flip(0), lambda w: w.roll(1, -1)])
def test_the_same_weights_elsewhere_are_another_base(tmp_path, change):
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    folder = selfdoubt.save(vote.Wrapper(rank=2)(base), tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(change(p))
    with pytest.raises(BaseMismatchError, match="another base model"):
        selfdoubt.load(folder, other)


@pytest.mark.parametrize("seed", range(20))
def test_a_few_bits_are_the_same_base(tmp_path, seed):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    folder = selfdoubt.save(vote.Wrapper(rank=2)(base), tmp_path)
    with torch.no_grad():
        for layer in (base[0], base[2]):
            step = layer.weight.abs().amax() / 7  # signed 4-bit numbers
            layer.weight.copy_((layer.weight / step).round() * step)
    selfdoubt.load(folder, base)


def test_a_fingerprint_without_alignments_still_fits(tmp_path):
    base = mlp()
    folder = selfdoubt.save(vote.Wrapper(rank=2)(base), tmp_path)
    manifest = json.loads((folder / "selfdoubt.json").read_text())
    numbers = manifest["base"]["fingerprint"]
    assert {len(value) for value in numbers.values()} == {3}
    manifest["base"]["fingerprint"] = {name: value[:2] for name, value in numbers.items()}
    del manifest["checksums"]
    (folder / "selfdoubt.json").write_text(json.dumps(manifest))
    selfdoubt.load(folder, base)


def test_saving_again_replaces_the_old_one(tmp_path):
    base = mlp()
    selfdoubt.save(vote.Wrapper(n_voters=5)(base), tmp_path)
    second = shaken(vote.Wrapper(n_voters=2)(base))
    selfdoubt.save(second, tmp_path)
    x = INPUTS["mlp"]
    assert torch.equal(selfdoubt.load(tmp_path, base)(x), second(x))


def test_what_lies_elsewhere_is_left_out_and_told_by_nothing(tmp_path):
    wrapped = sculpt.Wrapper()(mlp())
    elsewhere = {n for n, _ in wrapped.named_parameters() if n.endswith("bias") and ".branch." not in n}
    folder = selfdoubt.save(wrapped, tmp_path, elsewhere=elsewhere)
    manifest = storage.read_manifest(folder)
    assert not elsewhere & {*load_file(folder / "added.safetensors"), *manifest["base"]["fingerprint"]}
    for name in elsewhere:
        wrapped.get_parameter(name).data += 1
    storage._check_fits(folder, wrapped, load_file(folder / "added.safetensors"), manifest["base"])


def test_nothing_to_save(tmp_path):
    with pytest.raises(WrapError, match=r"^Sequential is not wrapped, so there is nothing to save: wrap it first"):
        selfdoubt.save(mlp(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_wrapper_is_only_for_lora(tmp_path, saved):
    folder, base = saved
    manifest = json.loads((folder / "selfdoubt.json").read_text())
    (folder / "selfdoubt.json").write_text(json.dumps(manifest | {"wrappers": []}))
    with pytest.raises(LoadError, match=r"selfdoubt\.json is broken"):
        selfdoubt.load(folder, base)
    del manifest["checksums"]
    (folder / "selfdoubt.json").write_text(json.dumps(manifest | {"wrappers": [], "lora": True}))
    with pytest.raises(LoadError, match=r"has LoRA beneath its wrapper, and the model has none yet"):
        selfdoubt.load(folder, base)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(7)
    base = mlp()
    return selfdoubt.save(vote.Wrapper(n_voters=2, param_filter="weight")(base), tmp_path, base="me/base"), base


def test_a_base_of_another_shape(saved):
    folder, _ = saved
    with pytest.raises(BaseMismatchError) as error:
        selfdoubt.load(folder, mlp(4, 9, 3))
    text = one_line(error)
    assert "made for another base model than this (me/base)" in text
    assert "(2, 8, 4)" in text
    assert "(2, 9, 4)" in text


def test_a_base_of_other_names(saved):
    folder, _ = saved
    with pytest.raises(BaseMismatchError, match=r"lacks module.a.0.deviations.weight"):
        selfdoubt.load(folder, nn.ModuleDict({"a": mlp()}))


def test_a_base_with_fewer_layers(saved):
    folder, _ = saved
    with pytest.raises(BaseMismatchError, match=r"has module.2.deviations.weight, which the model lacks"):
        selfdoubt.load(folder, mlp(4, 8))


def test_a_base_that_the_filter_does_not_know(saved):
    folder, _ = saved
    with pytest.raises(BaseMismatchError) as error:
        selfdoubt.load(folder, nn.Sequential(nn.ReLU()))
    assert "does not fit Sequential" in one_line(error)


def test_a_base_of_the_same_shape_with_other_weights(saved):
    folder, base = saved
    selfdoubt.load(folder, base)
    torch.manual_seed(8)
    with pytest.raises(BaseMismatchError) as error:
        selfdoubt.load(folder, mlp())
    assert "differs; load it onto me/base" in one_line(error)


@pytest.mark.parametrize("changed", ["0.weight", "2.weight", "2.bias"])
def test_a_base_that_has_learnt_since(saved, changed):
    folder, base = saved
    with torch.no_grad():
        base.get_parameter(changed).add_(1)
    with pytest.raises(BaseMismatchError, match=rf"leaf\.{changed[2:]} differs; load it onto me/base$"):
        selfdoubt.load(folder, base)


def test_a_base_without_a_name_is_not_called_none(tmp_path):
    base = mlp()
    selfdoubt.save(vote.Wrapper(n_voters=2)(base), tmp_path)
    for other in (mlp(4, 9, 3), nn.ModuleDict({"a": mlp()})):
        with pytest.raises(BaseMismatchError, match=r"made for another base model than this: ") as error:
            selfdoubt.load(tmp_path, other)
        assert "None" not in one_line(error)
    with torch.no_grad():
        base[0].weight.add_(1)
    with pytest.raises(BaseMismatchError, match=r"differs; load it onto that one$"):
        selfdoubt.load(tmp_path, base)


def test_a_failed_load_leaves_the_base_as_it_was(saved):
    folder, _ = saved
    other = mlp()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(BaseMismatchError):
        selfdoubt.load(folder, other)
    assert all(torch.equal(before[n], p) for n, p in other.state_dict().items())


def test_no_folder(tmp_path):
    with pytest.raises(LoadError, match=r"is not an adapter folder: it has no selfdoubt\.json; .*selfdoubt\.save$"):
        selfdoubt.load(tmp_path / "nowhere", mlp())


def test_no_weights(saved):
    folder, base = saved
    (folder / "added.safetensors").unlink()
    with pytest.raises(LoadError) as error:
        selfdoubt.load(folder, base)
    assert "cannot be read" in one_line(error)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(saved, keep):
    folder, base = saved
    path = folder / "added.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError) as error:
        selfdoubt.load(folder, base)
    assert "download the adapter again" in one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"vote"', "{}", "\udcff"])
def test_a_manifest_that_is_none(saved, text):
    folder, base = saved
    (folder / "selfdoubt.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LoadError) as error:
        selfdoubt.load(folder, base)
    assert "selfdoubt.json" in one_line(error)


# Every entry of a manifest, one after another, in every wrong way; as for users, whose types nobody checks.
BREAK = """
import copy, itertools, json, sys
from pathlib import Path
import torch, selfdoubt
from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import LoadError

def paths(tree, prefix=()):
    yield prefix
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))

folder, tried = Path(sys.argv[1]), 0
base = torch.nn.Sequential(torch.nn.Linear(2, 2))
for wrapped in (
    vote.Wrapper(n_voters=2, param_filter="weight")(sculpt.Wrapper()(base)),
    sample.Wrapper(distribution=sample.Bernoulli(0.1))(base),
):
    whole = json.loads((selfdoubt.save(wrapped, folder, base="me/base") / "selfdoubt.json").read_text())
    changes = [None, [], {}, "text", -1, 0.5, [3], {"a": 1}, "gone"]
    for place, change in itertools.product(list(paths(whole))[1:], changes):
        manifest = parent = copy.deepcopy(whole)
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = change
        if change == "gone":
            del parent[place[-1]]
        (folder / "selfdoubt.json").write_text(json.dumps(manifest))
        tried += 1
        try:
            selfdoubt.load(folder, base)  # some entries have defaults, and some are only for people
        except LoadError as error:
            assert "\\n" not in str(error), (place, change, error)
        except Exception as error:
            print("WRONG", place, change, type(error).__name__, error)
print("tried", tried)
"""


def test_any_entry_of_a_card_may_be_broken(tmp_path):
    lines = run(BREAK, str(tmp_path)).splitlines()
    assert int(lines[-1].removeprefix("tried ")) > 400
    assert not [line for line in lines if line.startswith("WRONG")]


def test_a_newer_format(saved):
    folder, base = saved
    path = folder / "selfdoubt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(LoadError, match=r"has format 99, and this version reads 1; upgrade selfdoubt$"):
        selfdoubt.load(folder, base)


@pytest.mark.parametrize(
    "spec",
    [
        vote.Wrapper(n_voters=7, rank=3, shared_inputs=("a",), output="logits"),
        sample.Wrapper(distribution=sample.Bernoulli(0.25, trainable=True)),
        sample.Wrapper(distribution=sample.Normal(0.25)),
        sculpt.Wrapper(distribution=sculpt.Laplace, n_layers=1, rank=None),
    ],
)
def test_settings_survive_json(spec):
    assert storage.from_json(json.loads(json.dumps(storage.to_json(spec)))) == spec


def test_other_names_of_a_wrapper_are_saved_too(tmp_path):
    folder = selfdoubt.save(vote.EagerWrapper(n_voters=2)(mlp()), tmp_path)
    assert storage.read_manifest(folder)["wrappers"][0]["method"] == "vote"


def test_extras_must_be_numbers_that_json_knows(tmp_path):
    with pytest.raises(ValueError, match=r"JSON"):
        selfdoubt.save(vote.Wrapper()(mlp()), tmp_path, extra={"reference": [float("nan")]})
    assert not (tmp_path / "selfdoubt.json").exists()


def test_a_plain_model_is_saved_for_its_calibration_alone(tmp_path):
    model = copy.deepcopy(MODELS["llama"]())
    storage.save(model, tmp_path, extra={"calibration": {"kind": "isotonic"}})
    assert not (tmp_path / storage.WEIGHTS).exists()
    assert storage.restore(tmp_path, model) is model
    with pytest.raises(LoadError, match="brings no wrapper"):
        storage.load(tmp_path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(BaseMismatchError, match="was made for another base model"):
        storage.restore(tmp_path, model)
