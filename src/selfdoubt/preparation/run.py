"""``prepare``: makes a model risk-aware without labels and without a gradient, and writes the adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdoubt import storage
from selfdoubt.compat import is_lora_weight
from selfdoubt.data.order import Draft, assign_ids, check_limit, choose_subset
from selfdoubt.data.questions import AS_USUAL, Columns, Question
from selfdoubt.data.unlabelled import load_unlabelled, strip_answers
from selfdoubt.errors import ConfigError, DataError, LoadError, PromptError
from selfdoubt.eval.progress import build_progress
from selfdoubt.eval.prompts import BuiltPrompt, Prompting, build_prompt
from selfdoubt.eval.run import digest_questions
from selfdoubt.fingerprint import compute_fingerprint, find_difference
from selfdoubt.lm.adapters.new_folder import check_free, new_folder
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scores import reference_quantiles
from selfdoubt.lm.text.prompt import encode
from selfdoubt.members import Wrapped
from selfdoubt.preparation.additions import add_density, add_members, check_members
from selfdoubt.preparation.config import PreparationConfig
from selfdoubt.preparation.work import WorkFolder
from selfdoubt.rows import list_added_names
from selfdoubt.spec import Spec

if TYPE_CHECKING:
    from rich.progress import Progress

#: Entry of the manifest with what a preparation was made from, and value of ``kind`` in the mark of its folder.
PREPARED = "prepared"
#: Questions are asked as ``ask`` asks them: no instruction, a passage before its question.
AS_ASKED = Prompting("chat", instruction="")


@dataclass(frozen=True)
class Preparation:
    """A finished preparation."""

    folder: Path  #: the adapter: ``RiskAwareLM.load(adapter=folder)``
    answers: int  #: number of reference answers
    cut: int  #: those that were cut at ``max_tokens``
    left_out: tuple[str, ...]  #: questions without room for an answer in the model's context, or that it cannot read
    lm: RiskAwareLM = field(repr=False, compare=False)  #: the model, with its reference

    def lines(self) -> list[str]:
        """Return what was done and what comes next, for a terminal."""
        cut = f" ({self.cut:,} cut at the most tokens)" if self.cut else ""
        left_out = []
        if self.left_out:
            example = self.left_out[0] if len(self.left_out[0]) <= 60 else f"{self.left_out[0][:60]}..."
            count = f"{len(self.left_out):,} question{'s' if len(self.left_out) > 1 else ''}"
            left_out = [f"{count} left out: no room for an answer, or not readable by the tokenizer, e.g. {example!r}"]
        return [
            f"percentiles are relative to {self.answers:,} answers of this model{cut}",
            *left_out,
            f'stored in {self.folder}: selfdoubt ask --adapter {self.folder} "..."',
        ]


def prepare(
    model: RiskAwareLM | str | os.PathLike[str] | Callable[[], RiskAwareLM],
    out: str | os.PathLike[str],
    questions: str | os.PathLike[str] | Sequence[str | Question] | None = None,
    *,
    wrapper: Spec | None = None,
    config: PreparationConfig | None = None,
    limit: int | None = None,
    columns: Columns = AS_USUAL,
    split: str | None = None,
    sources: Sequence[str | os.PathLike[str]] = (),
) -> Preparation:
    """Make a model risk-aware without labels: answer questions, and keep the quantiles of the scores in an adapter.

    Answers of the model with the adapter have percentiles and rank scores. A run that was cut off goes on: its answers
    are in a folder next to ``out``, and the result is the same.

    Args:
        model: The model, which answers as it is; a folder or name on the hub to load; or a function that loads it. It
            gets all that the adapter has, in place.
        out: The adapter folder to write: missing, empty, or prepared before.
        questions: A file (see ``selfdoubt.data.load_unlabelled``), the name of a set, or a list of questions; None
            takes those that ship with this package.
        wrapper: Untrained ``vote`` or ``sample`` to add; the model itself still answers. Noise "auto" is searched: the
            largest that keeps the answers. None adds none: on real models untrained members say little.
        config: Settings; None takes the defaults.
        limit: Size of a random subset to ask; None asks all.
        columns: Columns of question and passage in a file; None in a field finds them by usual names.
        split: A split on the hub; None takes the usual one.
        sources: Folders that are read, and must not lie in ``out``, e.g. the model's adapter.

    Raises:
        ConfigError: If an option is out of range, ``out`` holds something else, or the model is calibrated already.
        DataError: If the questions cannot be read, or none can be asked.
        LoadError: If the model cannot be loaded.

    Example:
        ``selfdoubt.prepare("HuggingFaceTB/SmolLM2-135M-Instruct", "prepared").folder``
    """
    config = config or PreparationConfig()
    check_members(wrapper)
    out = Path(out).expanduser().resolve()
    check_out(out, tuple(sources))
    asked = _list_questions(questions, limit, config.seed, columns, split)
    lm = _load(model)
    if lm.calibration is not None:
        raise ConfigError(
            "the model has a calibration, which was learnt with the scores that it has now; prepare a model before it "
            "is calibrated, e.g. without --adapter"
        )
    _check_same_base(out, lm)
    prompts = [build_prompt(question, how=AS_ASKED) for question in asked]
    lengths = [_count_tokens(lm, prompt) for prompt in prompts]
    order = sorted((i for i, n in enumerate(lengths) if n is not None), key=lambda i: (-(lengths[i] or 0), i))
    if not order:
        raise DataError(
            f"none of the {len(asked)} questions leaves room for an answer in the model's {lm.front.context} tokens; "
            "give shorter ones"
        )
    used = [prompts[i] for i in order]
    members = {} if wrapper is None else {"members": storage.to_json(wrapper)}
    about = {**_describe_model(lm), **members, **asdict(config), "questions": digest_questions(asked)}
    work = WorkFolder(out, {key: value for key, value in about.items() if key != "density"})
    with build_progress() as progress:
        if wrapper is not None:
            add_members(lm, wrapper, used, progress)
        answers = _answer(lm, used, config, work, progress)
        if config.density:
            answers = add_density(lm, used, answers, config.batch_size, progress)
    prepared = {
        "questions": len(answers), "max_tokens": config.max_tokens,
        "source": os.fspath(questions) if isinstance(questions, (str, os.PathLike)) else None,
    }  # fmt: skip
    lm.set_reference(reference_quantiles(answers), len(answers))
    with new_folder(out, {"kind": PREPARED}, tuple(sources)) as folder:
        lm.save(folder, about={PREPARED: prepared})
    work.remove()
    left_out = tuple(question.text for question, length in zip(asked, lengths, strict=True) if length is None)
    return Preparation(out, len(answers), sum(a.finish == "length" for a in answers), left_out, lm)


def _load(model: RiskAwareLM | str | os.PathLike[str] | Callable[[], RiskAwareLM]) -> RiskAwareLM:
    if isinstance(model, RiskAwareLM):
        return model
    return RiskAwareLM.load(model) if isinstance(model, (str, os.PathLike)) else model()


def check_out(out: Path, sources: tuple[str | os.PathLike[str], ...] = ()) -> None:
    """Check that an adapter may be written to a folder, before a large model loads.

    Raises:
        ConfigError: If it holds something else than a preparation, or one that was calibrated since.
    """
    if (out / storage.MANIFEST).is_file():
        try:
            manifest = storage.read_manifest(out)
        except LoadError as error:
            raise ConfigError(f"--out {out} holds a broken adapter ({error}); give another folder") from None
        if PREPARED not in manifest:
            raise ConfigError(
                f"--out {out} is an adapter already, which was not made by prepare; to prepare its model, give "
                "--adapter with it and another --out"
            )
        if manifest.get("calibration") is not None:
            raise ConfigError(
                f"--out {out} was calibrated after it was prepared, and preparing again would drop that; "
                "give another --out"
            )
    check_free(out, sources)


def _check_same_base(out: Path, lm: RiskAwareLM) -> None:
    """Raise ``ConfigError`` if a folder was prepared for another model."""
    if not (out / storage.MANIFEST).is_file():
        return
    base = storage.read_manifest(out)["base"]
    if find_difference(lm.model, base["fingerprint"]) is not None:
        raise ConfigError(f"--out {out} was prepared for another model ({base['name']}); give another --out")


def _list_questions(
    questions: str | os.PathLike[str] | Sequence[str | Question] | None,
    limit: int | None,
    seed: int,
    columns: Columns,
    split: str | None,
) -> list[Question]:
    is_named = isinstance(questions, (str, os.PathLike))
    if not is_named and (columns != AS_USUAL or split is not None):
        raise ConfigError("columns and split say how to read a file of questions; give its name as questions")
    if questions is None or isinstance(questions, (str, os.PathLike)):
        return load_unlabelled(questions, limit=limit, seed=seed, columns=columns, split=split)
    check_limit(limit)
    listed = [Question("", item) if isinstance(item, str) else strip_answers(item) for item in questions]
    if not listed:
        raise DataError("there are no questions; give a list with at least one")
    empty = next((place for place, question in enumerate(listed) if not question.text.strip()), None)
    if empty is not None:
        raise DataError(f"question {empty} of the list is empty; fix or remove it")
    drafts: list[Draft] = [(question, {}) for question in listed]
    return [question for question, _ in choose_subset(assign_ids("the list of questions", drafts), limit, seed)]


def _count_tokens(lm: RiskAwareLM, prompt: BuiltPrompt) -> int | None:
    """Return the tokens of a prompt; None if it cannot be read, or leaves no room for an answer."""
    try:
        n = len(encode(lm.tokenizer, prompt).ids)
    except PromptError:
        return None
    return n if lm.front.context is None or n < lm.front.context else None


def _answer(
    lm: RiskAwareLM, prompts: Sequence[BuiltPrompt], config: PreparationConfig, work: WorkFolder, progress: Progress
) -> list[Answer]:
    """Answer the batches that are not finished; return the answers of all, as they were written."""
    batches = [prompts[first : first + config.batch_size] for first in range(0, len(prompts), config.batch_size)]
    done = sum(len(batch) for b, batch in enumerate(batches) if work.has(b))
    task = progress.add_task("answering", total=len(prompts), completed=done)
    for b, batch in enumerate(batches):
        if not work.has(b):
            work.put(b, lm.generate(batch, max_tokens=config.max_tokens, batch_size=len(batch)))
            progress.advance(task, len(batch))
    return [answer for b in range(len(batches)) for answer in work.get(b)]


def _describe_model(lm: RiskAwareLM) -> dict[str, Any]:
    """Return everything about a model that its answers depend on: its name, a fingerprint, its wrappers and dtype."""
    added = {*list_added_names(lm.model), *_list_lora(lm)}
    digest = hashlib.sha256()
    for name, tensor in lm.model.state_dict().items():
        if name in added:
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return {
        "model": lm.name,
        "fingerprint": compute_fingerprint(lm.model, _list_lora(lm)),
        "wrappers": [storage.to_json(spec) for spec in _list_specs(lm.model)],
        "added": digest.hexdigest(),
        "dtype": str(next(lm.model.parameters()).dtype),
    }


def _list_lora(lm: RiskAwareLM) -> list[str]:
    return [name for name, _ in lm.model.named_parameters() if is_lora_weight(name)]


def _list_specs(model: Any) -> list[Any]:
    return [*_list_specs(model.module), model.spec] if isinstance(model, Wrapped) else []
