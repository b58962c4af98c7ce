"""Encodes chats into token ids and a mask of those that the loss predicts, in Arrow files that all processes share."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selfdoubt.data import chats
from selfdoubt.data.chats import INPUT, ChatMessages
from selfdoubt.data.questions import AS_USUAL, Columns
from selfdoubt.errors import ConfigError, DataError, LoadError, require
from selfdoubt.lm.load import find_turn_end
from selfdoubt.lm.text.prompt import encode_turns
from selfdoubt.train.config import TrainConfig

#: The Alpaca prompt as a chat template: with an input it has another first sentence and a place for it.
ALPACA = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- set with_input = messages | selectattr('role', 'equalto', 'input') | list | length > 0 -%}"
    "Below is an instruction that describes a task"
    "{%- if with_input %}, paired with an input that provides further context{% endif -%}"
    ". Write a response that appropriately completes the request."
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{%- elif message['role'] == 'input' %}{{ '\\n\\n### Input:\\n' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif -%}"
)


class EncodedChat(NamedTuple):
    """Ids of one chat; ``counts`` is True for those that the loss predicts."""

    ids: list[int]
    counts: list[bool]


def prepare_tokenizer(tokenizer: Any, prompt: str) -> None:
    """Give a tokenizer the template that the config asks for.

    Raises:
        ConfigError: If a chat template is asked for and there is none, or no token ends a text.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-text token, so a model cannot learn to end an answer")
    if prompt == "chat" and tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template; use prompt='alpaca', or 'auto'")
    if prompt == "alpaca" or tokenizer.chat_template is None:
        tokenizer.chat_template = ALPACA


def encode_chat(
    tokenizer: Any, chat: ChatMessages, *, loss_on: str, max_length: int, ends: frozenset[int] | None = None
) -> EncodedChat:
    """Return the ids of a chat; the loss predicts the assistant's words and what ends each of them, or everything.

    Args:
        tokenizer: Tokenizer with the template that is learnt.
        chat: Messages.
        loss_on: "response" or "all".
        max_length: Largest number of ids; the end is cut.
        ends: Token ids that end an answer when it is generated; None calls ``find_ends``.

    Raises:
        PromptError: If the chat template refuses the chat.
    """
    if tokenizer.chat_template != ALPACA:
        chat = _with_input_inside(chat)
    ids, turn = encode_turns(tokenizer, chat)
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    ends = find_ends(tokenizer) if ends is None else ends
    counts = [t in answers for t in turn]
    for last in [i for i in range(len(ids)) if turn[i] in answers and turn[i + 1 : i + 2] != [turn[i]]]:
        # An answer's end is the token behind its words at which generating stops, with the white space between them;
        # nothing after that is the model's to say.
        end = last + 1
        while end < len(ids) and turn[end] == -1 and ids[end] not in ends and not tokenizer.decode([ids[end]]).strip():
            end += 1
        if end < len(ids) and ids[end] in ends:
            counts[last + 1 : end + 1] = [True] * (end - last)
        elif turn[last] == len(chat) - 1:  # the template ends it with nothing, so the text's end does
            ids, counts = [*ids[: last + 1], tokenizer.eos_token_id], [*counts[: last + 1], True]
    counts[0] = False  # nothing predicts the first token
    if loss_on == "all":
        counts = [False] + [True] * (len(ids) - 1)
    elif chat[-1]["role"] == "assistant":  # what the template adds after the last answer teaches nothing
        end = max((i for i, counted in enumerate(counts) if counted), default=len(ids) - 1) + 1
        ids, counts = ids[:end], counts[:end]
    return EncodedChat(ids[:max_length], counts[:max_length])


def find_ends(tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end an answer, by the tokenizer and its template, so that a learnt end stops it."""
    return frozenset(i for i in (find_turn_end(tokenizer), tokenizer.eos_token_id) if i is not None)


def _with_input_inside(chat: ChatMessages) -> ChatMessages:
    joined: ChatMessages = []
    for message in chat:
        if message["role"] == INPUT:
            joined[-1] = dict(joined[-1], content=f"{joined[-1]['content']}\n\n{message['content']}")
        else:
            joined.append(message)
    return joined


class Splits(NamedTuple):
    """Arrow data sets with the columns ``ids``, ``counts``, ``length``, ``counted`` and ``chat`` (JSON)."""

    train: Any
    val: Any
    empty: int  #: examples without a response, left out
    cut: int  #: examples cut to the longest length


def prepare_splits(config: TrainConfig, tokenizer: Any, folder: Path) -> Splits:
    """Encode all data into an Arrow file in ``folder``, and split off the validation share.

    The file's name says what is in it, and it appears as a whole: processes that train together may all call this, and
    a run that is resumed finds its data done.

    Raises:
        DataError: If the data cannot be read, or too few examples are left.
    """
    datasets = require("datasets", "train")
    datasets.disable_progress_bars()
    key = _key(config, tokenizer)
    if (folder / f"{key}.json").is_file():
        return load_splits(config, folder, key)
    left_out = {"empty": 0, "cut": 0}
    ends = find_ends(tokenizer)

    def rows() -> Iterator[dict[str, Any]]:
        for chat in chats.read_chats(config.data, limit=config.limit, columns=_columns(config)):
            if not any(m["content"].strip() for m in chat if m["role"] == "assistant"):
                left_out["empty"] += 1
                continue
            example = encode_chat(tokenizer, chat, loss_on=config.loss_on, max_length=config.max_length + 1, ends=ends)
            ids, counts = example.ids[: config.max_length], example.counts[: config.max_length]
            if not any(counts):  # the question alone fills the length
                left_out["empty"] += 1
                continue
            left_out["cut"] += len(example.ids) > config.max_length
            yield {"ids": ids, "counts": counts, "length": len(ids), "counted": sum(counts), "chat": json.dumps(chat)}

    features = datasets.Features({
        "ids": datasets.List(datasets.Value("int32")), "counts": datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"), "counted": datasets.Value("int32"), "chat": datasets.Value("string"),
    })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        part = Path(work) / "part.arrow"
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(part)) as writer:
            for row in rows():
                writer.write(row)
            writer.finalize()
        part.replace(folder / f"{key}.arrow")
        (Path(work) / "part.json").write_text(json.dumps(left_out))
        (Path(work) / "part.json").replace(folder / f"{key}.json")
    for old in folder.glob("*.*"):
        if old.stem != key:
            old.unlink(missing_ok=True)
    return load_splits(config, folder, key)


def load_splits(config: TrainConfig, folder: Path, key: str | None = None) -> Splits:
    """Read the encoded data that ``prepare_splits`` wrote into a folder, with any key if None.

    Raises:
        LoadError: If they are not there.
        DataError: If there are too few examples.
    """
    datasets = require("datasets", "train")
    key = key or next((file.stem for file in folder.glob("*.json")), "")
    if not (folder / f"{key}.arrow").is_file():
        raise LoadError(f"{folder} holds no encoded data of a run; train again")
    everything = datasets.Dataset.from_file(str(folder / f"{key}.arrow"))
    if len(everything) < 2:
        raise DataError(f"{config.data} has {len(everything)} examples with a response; give at least two")
    validation = max(round(len(everything) * config.val_share), 1 if config.val_share else 0)
    order = _shuffled(len(everything), config.seed)
    val, train = everything.select(sorted(order[:validation])), everything.select(sorted(order[validation:]))
    return Splits(train, val, **json.loads((folder / f"{key}.json").read_text()))


def _columns(config: TrainConfig) -> Columns:
    return Columns(question=config.question_column, answers=config.answer_column, named_by=config.answers_name)


#: How records are read and encoded; raised where that changes, so that older encoded data are not taken.
ENCODING = 2


def _key(config: TrainConfig, tokenizer: Any) -> str:
    """Return a hash of all that determines the encoded data: state of the source, tokenizer, settings."""
    file = Path(config.data).expanduser()
    state = (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None
    state_of_data = (
        ENCODING, config.data, state, config.limit, config.loss_on, config.max_length, config.model, config.revision,
        tokenizer.chat_template, len(tokenizer), *([_columns(config)] if _columns(config) != AS_USUAL else []),
    )  # fmt: skip
    return hashlib.sha256(repr(state_of_data).encode()).hexdigest()[:16]


def _shuffled(n: int, seed: int) -> list[int]:
    return [int(i) for i in torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
