"""Adapter folders that someone damaged: a change is refused in one line or changes nothing; there is no traceback."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
from typing import Any

import pytest
import torch

from selfdoubt import sample, sculpt, storage, vote
from selfdoubt.errors import LoadError, SelfdoubtError
from selfdoubt.lm.adapters.adapter import check_adapter, load_adapter, read_adapter, save_adapter
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.calibration import Calibration, StateHead, read_calibration
from tests.zoo import causal, prompts

pytest.importorskip("peft")

IDS = torch.tensor(prompts(5))
WRAPPERS = {
    "vote": lambda model: vote.Wrapper(n_voters=2, rank=2, alpha=0.7)(model),
    "vote full": lambda model: vote.Wrapper(n_voters=2, shared_inputs=("use_cache",))(model),
    "sample": lambda model: sample.Wrapper(n_samples=2, distribution=sample.Normal(0.4))(model),
    "sample trained": lambda model: sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.2, trainable=True))(
        model
    ),
    "sculpt": lambda model: sculpt.Wrapper(rank=3)(model),
    "vote around sculpt": lambda model: vote.Wrapper(n_voters=2, rank=2)(sculpt.Wrapper(rank=3)(model)),
    "sample on lora": lambda model: sample.Wrapper(n_samples=2)(add_lora(model, r=2, targets="embed_tokens|q_proj")),
    "lora": lambda model: add_lora(model, r=2),
}
HEAD = Calibration(
    "logistic", ("sum_nll", "mean_nll"), weights=(-1.5, -0.5), linear=(-0.25, 0.125), bias=0.75,
    ranges=((0.0, 4.0), (0.1, 2.0)), state=StateHead(1, "first", (0.5, -1.0)), threshold=0.6,
    promise={"target_accuracy": 0.9, "answers": 7}, about={"candidate": "answer"},
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e-320, 10**9, 10**400, "", "text", "a\nb", "\ud800", [], [1], [[1, 2]],
    {}, {"a": 1}, "../../etc/passwd",
)  # fmt: skip


def base():
    return copy.deepcopy(causal("llama"))


def logits(model):
    with torch.no_grad():
        return model.forecast(input_ids=IDS)["logits"].members if hasattr(model, "forecast") else model(IDS).logits


def outcome(folder):
    """What a folder gives: logits of all members, what ranks them, and what calibrates them."""
    manifest = check_adapter(folder).manifest or {}
    model = load_adapter(base(), folder)
    return logits(model), manifest.get("reference"), read_calibration(manifest)


def same(found, expected):
    return torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


@pytest.fixture(scope="module", params=WRAPPERS)
def whole(request, tmp_path_factory):
    """A folder and what it gives."""
    torch.manual_seed(1)
    model = WRAPPERS[request.param](base())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    extra = {"reference": {"sum_nll": [0.0, 1.0, 1.0, 5.5]}, "calibration": HEAD.to_json(), "training": {"losses": [1]}}
    folder = save_adapter(model.eval(), tmp_path_factory.mktemp("whole"), base="me/base", extra=extra)
    return folder, outcome(folder)


@pytest.fixture
def damaged(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "damaged")


def paths(tree, prefix=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def changes(manifest):
    """Every entry replaced by every odd value, taken out, and with a stranger beside it."""
    places = list(paths(manifest))
    yield from ((place, "set", value) for place, value in itertools.product(places, ODD))
    yield from ((place, act, None) for place in places for act in ("remove", "add", "twice"))


def changed(manifest, place, act, value):
    """The text of a manifest with one change; None where it is none."""
    new = copy.deepcopy(manifest)
    parent = new
    for key in place[:-1]:
        parent = parent[key]
    own = parent[place[-1]]
    if act == "set":
        if type(own) is type(value) and own == value:
            return None
        parent[place[-1]] = value
    elif act == "remove":
        del parent[place[-1]]
    elif act == "add":
        if isinstance(own, dict):
            own["stranger"] = 1
        elif isinstance(own, list):
            own.append(copy.deepcopy(own[-1]) if own else 1)
        else:
            return None
    text = json.dumps(new)
    if act == "twice":
        if not isinstance(place[-1], str):
            return None
        entry = json.dumps({place[-1]: own})[1:-1]
        text = text.replace(entry, f"{entry}, {entry}", 1)
    return text


def refused(act):
    """What refuses in one line, or None where it goes well."""
    error, found = None, None
    try:
        found = act()
    except SelfdoubtError as raised:
        error = raised
    assert error is None or ("\n" not in str(error) and len(str(error)) < 1200), error
    return error, found


def some(items, share):
    items = list(items)
    return items if share >= 1 else random.Random(0).sample(items, int(len(items) * share))


QUICK = pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=pytest.mark.slow)])


@QUICK
def test_a_changed_manifest_is_refused_or_changes_nothing(whole, damaged, share):
    manifest = json.loads((damaged / storage.MANIFEST).read_text())
    tried = 0
    for change in some(changes(manifest), share):
        text = changed(manifest, *change)
        if text is None:
            continue
        (damaged / storage.MANIFEST).write_text(text)
        error, found = refused(lambda: outcome(damaged))
        tried += 1
        assert error is not None or same(found, whole[1]), change
    assert tried > 20


@pytest.mark.parametrize("share", [0.01, pytest.param(1.0, marks=pytest.mark.slow)])
def test_without_checksums_a_changed_manifest_is_read_or_refused_by_the_name_of_its_entry(whole, damaged, share):
    manifest = json.loads((damaged / storage.MANIFEST).read_text())
    del manifest["checksums"]
    for change in some(changes(manifest), share):
        text = changed(manifest, *change)
        if text is None:
            continue
        (damaged / storage.MANIFEST).write_text(text)
        error, _ = refused(lambda: outcome(damaged))
        if change[1] == "set" and error is not None and isinstance(change[0][-1], str):
            # The message says compile, which is what Python calls the entry.
            said = (change[0][-1].replace("symbolic_trace", "compile"), change[0][-1], "does not fit", "another base")
            assert any(words in str(error) for words in said), (change, str(error))


@pytest.mark.parametrize("many", [1, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_byte_of_a_file_is_refused_or_changes_nothing(whole, damaged, sealed, many):
    """Without checksums a tensor may be another; then only a traceback would be wrong."""
    if not sealed:
        manifest = json.loads((damaged / storage.MANIFEST).read_text())
        del manifest["checksums"]
        (damaged / storage.MANIFEST).write_text(json.dumps(manifest))
    generator = random.Random(0)
    for file in [f for f in damaged.iterdir() if f.name != storage.MANIFEST]:
        data = file.read_bytes()
        places = [generator.randrange(len(data)) for _ in range(many)] + [generator.randrange(600) for _ in range(many)]
        for place in places:
            flipped = bytearray(data)
            flipped[place % len(data)] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            error, found = refused(lambda: outcome(damaged))
            assert error is not None or not sealed or same(found, whole[1])
        file.write_bytes(data)


TEXTS = {
    "empty": b"", "truncated": b'{"format": 1, "wra', "a list": b"[]", "a number": b"3", "null": b"null",
    "not UTF-8": b'{"format": "\xff"}', "UTF-16": '{"format": 1}'.encode("utf-16"), "a BOM": b"\xef\xbb\xbf{}",
    "deep lists": b"[" * 100_000, "deep tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"format": NaN}', "infinity": b'{"format": -Infinity}', "beyond floats": b'{"format": 1e999}',
    "many digits": b'{"format": ' + b"9" * 5000 + b"}", "a key twice": b'{"format": 1, "format": 1}',
    "no format": b'{"wrappers": []}', "a comment": b'{"format": 1} // me',
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", ["selfdoubt.json", "adapter_config.json"])
def test_a_file_that_is_no_json_table_is_named(tmp_path, name, file):
    save_adapter(add_lora(base(), r=2), tmp_path)
    (tmp_path / file).write_bytes(TEXTS[name])
    with pytest.raises(LoadError) as error:
        load_adapter(base(), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file} is broken: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["selfdoubt.json", "added.safetensors", "adapter_config.json"])
def test_a_folder_in_a_files_place(tmp_path, file):
    save_adapter(sample.Wrapper(n_samples=2)(add_lora(base(), r=2)), tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(LoadError) as error:
        load_adapter(base(), tmp_path)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


NAMED = [
    (("wrappers", 0, "alpha"), True, "wrappers[0].alpha must be a finite number"),
    (("wrappers", 0, "alpha"), 1e308, "wrappers[0].alpha must be a finite number at least -1e+06 and at most 1e+06"),
    (("wrappers", 0, "n_voters"), 10**9, "wrappers[0].n_voters must be a whole number from 1 to 1000000"),
    (("wrappers", 0, "n_voters"), 3, "n_voters must be 2 as in added.safetensors, found 3"),
    (("wrappers", 0, "rank"), 65536, "rank must be 2 as in added.safetensors, found 65536"),
    (
        ("wrappers", 0, "shared_inputs"),
        [[1, 2]],
        "wrappers[0].shared_inputs[0] must be a text of one line, found [1, 2]",
    ),
    (("wrappers", 0, "param_filter"), "(", "wrappers[0].param_filter must be null or a regular expression, found '('"),
    (("reference",), [1, 2], "reference must be null or a table, found [1, 2]"),
    (("reference", "sum_nll"), [2.0, 1.0], "reference.sum_nll[1] must be at least 2.0, as numbers ascend, found 1.0"),
    (("reference", "sum_nll"), [], "reference.sum_nll must be a list of at least 1, found []"),
    (("calibration", "threshold"), "high", "calibration.threshold must be null or a finite number at least 0 and at"),
    (("calibration", "weights"), [1.0], "calibration.weights must be a list of 2, found 1"),
    (("base", "fingerprint"), {"a": [1.0]}, "base.fingerprint.a must be a list of at least 2, found [1.0]"),
    (("base", "name"), "a\nb", "base.name must be null or a text of one line, found 'a\\nb'"),
    (("lora",), 1, "lora must be true or false, found 1"),
    (("checksums",), {"manifest": "0" * 64, "../x": "0" * 64}, "checksums must be a table of manifest, added.safe"),
]


@pytest.mark.parametrize(("place", "value", "words"), NAMED)
def test_a_wrong_entry_is_named_with_file_value_and_repair(tmp_path, place, value, words):
    model = vote.Wrapper(n_voters=2, rank=2)(base())
    extra = {"reference": {"sum_nll": [0.0, 1.0]}, "calibration": HEAD.to_json()}
    save_adapter(model, tmp_path, extra=extra)
    manifest = json.loads((tmp_path / storage.MANIFEST).read_text())
    del manifest["checksums"]
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    (tmp_path / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError) as error:
        load_adapter(base(), tmp_path)
    assert words in str(error.value)
    assert str(tmp_path / storage.MANIFEST) in str(error.value)
    assert str(error.value).endswith(("save or download it again", "run `selfdoubt calibrate` again"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 10**9), ("r", 60_000), ("r", True), ("lora_alpha", 1e308), ("lora_alpha", "6"), ("target_modules", [1]),
     ("rank_pattern", {"q_proj": 50_000}), ("rank_pattern", [1]), ("fan_in_fan_out", "no"), ("bias", 3)],
)  # fmt: skip
def test_a_wrong_entry_of_pefts_config_is_named_before_a_layer_is_made(tmp_path, key, value):
    save_adapter(add_lora(base(), r=2), tmp_path)
    (tmp_path / storage.MANIFEST).unlink()  # as plain PEFT leaves it
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LoadError, match=rf"adapter_config\.json is broken: {key}") as error:
        load_adapter(base(), tmp_path)
    assert "\n" not in str(error.value)


def test_folders_from_before_there_were_checksums_load(whole, damaged):
    manifest = json.loads((damaged / storage.MANIFEST).read_text())
    del manifest["checksums"]
    (damaged / storage.MANIFEST).write_text(json.dumps(manifest))
    assert same(outcome(damaged), whole[1])


def test_a_change_by_hand_is_accepted_as_the_error_says(tmp_path):
    save_adapter(vote.Wrapper(n_voters=2, rank=2)(base()), tmp_path)
    manifest = json.loads((tmp_path / storage.MANIFEST).read_text())
    manifest["wrappers"][0]["alpha"] = 0.5
    (tmp_path / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LoadError, match=r"selfdoubt\.json was changed after it was saved.*python -c ") as error:
        load_adapter(base(), tmp_path)
    command = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(command, {})
    assert load_adapter(base(), tmp_path).spec.alpha == 0.5


def test_a_file_that_came_later_is_refused(tmp_path):
    folder = save_adapter(vote.Wrapper(n_voters=2, rank=2)(base()), tmp_path / "a")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"tokenizer_config\.json was not there when the adapter was saved; remove it"):
        check_adapter(folder)
    bare = save_adapter(add_lora(base(), r=2), tmp_path / "b")
    shutil.copy(folder / "added.safetensors", bare)
    with pytest.raises(LoadError, match=r"added\.safetensors was not there when the adapter was saved"):
        check_adapter(bare)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    model = vote.Wrapper(n_voters=2, rank=2)(base())
    save_adapter(model, tmp_path)
    odd: list[Any] = [[1.0], {"a": []}, {"a": [2.0, 1.0]}]
    for reference in odd:
        with pytest.raises(ValueError, match=r"^selfdoubt\.json cannot be written: reference"):
            storage.save(model, tmp_path, extra={"reference": reference})
    assert read_adapter(tmp_path).manifest is not None


def test_the_voters_that_ship_carry_checksums():
    from selfdoubt import pocket

    manifest = storage.read_manifest(pocket.voters_folder())
    assert set(manifest["checksums"]) == {"manifest", "added.safetensors"}
    storage.verify(pocket.voters_folder(), manifest)
