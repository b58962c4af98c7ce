"""Ways to train on the same records, each a LightningModule in a Trainer of its own, that take one step at a time.

The model has a known shape and random weights. The tokenizer is a byte-level BPE of 16,384 pieces at most, learnt from
the records themselves: about 1.4 tokens a word, as real ones have. Its ids fill only the front of a large vocabulary,
which costs the same: logits are computed for all of it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import memory
from benchmarks.arms import SHAPES
from selfdoubt import vote

Record = dict[str, str]
#: Puts rows, each of one or more records, into a batch; returns how many tokens of it are no padding, too.
Collate = Callable[[Sequence[Sequence[Record]]], tuple[Any, int]]

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RATE = 2e-4


@dataclass(frozen=True)
class Options:
    """What all arms share."""

    shape: str
    vocabulary: int
    batch: int
    length: int  #: longest example in tokens
    steps: int
    nf4: bool
    tokenizer: str  #: its folder


def text(record: Record) -> str:
    """A record in the Alpaca prompt."""
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    if record["input"]:
        task += ", paired with an input that provides further context"
        question = f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}"
    else:
        question = f"### Instruction:\n{record['instruction']}"
    return f"{task}. {request}\n\n{question}\n\n### Response:\n{record['output']}"


def write_tokenizer(records: Sequence[Record], vocabulary: int, folder: Path) -> None:
    """Learn a tokenizer from records; the same records give the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 16384), special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(map(text, records), learner)
    whole = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    whole.save_pretrained(folder)


def build(options: Options) -> nn.Module:
    """A frozen model of a known shape with random weights in bfloat16, or in 4 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**TINY, **SHAPES.get(options.shape, {}), "vocab_size": options.vocabulary}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # on the host it would take minutes
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048))
    torch.set_default_dtype(before)
    model.requires_grad_(False)
    if options.nf4:
        _pack(model)
    frozen: nn.Module = model.train()
    _load_code(frozen)
    return frozen


def make(arm: str, options: Options) -> tuple[lightning.LightningModule, Collate]:
    """An arm by name: ``tutorial-lora``, ``tutorial-vote``, ``peft`` or ``ours-WRAPPER[-packed][-compiled]...``."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(options.tokenizer), build(options)
    if arm.startswith("ours-"):
        from benchmarks.train_ours import ours

        return ours(arm.removeprefix("ours-"), model, tokenizer, options)
    padding = "longest" if arm == "peft" else "max_length"

    def collate(rows: Sequence[Sequence[Record]]) -> tuple[Any, int]:
        encoded = tokenizer(
            [text(record) + tokenizer.eos_token for row in rows for record in row],
            padding=padding, truncation=True, max_length=options.length, return_tensors="pt",
        )  # fmt: skip
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask}, int(mask.sum())

    if arm == "peft":
        return Peft(get_peft_model(model, _lora("all-linear"))), collate
    return Tutorial(model, arm.removeprefix("tutorial-")), collate


class Peft(lightning.LightningModule):
    """The usual way: LoRA by PEFT, batches as long as their longest example, the model's own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:  # noqa: ARG002
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss: Tensor = self.model(**batch, labels=labels).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=RATE)


class Tutorial(lightning.LightningModule):
    """The tutorial's way: all examples padded to one length, full logits, labels one-hot in floats.

    The labels are written straight into zeros on the device, and the voters have a low rank as ours do: only what the
    way itself costs is measured.
    """

    def __init__(self, whole: Any, kind: str) -> None:
        super().__init__()
        self.embedding = whole.get_input_embeddings()
        self.is_vote = kind == "vote"
        self.model: nn.Module
        if self.is_vote:
            self.model = vote.EagerWrapper(param_filter="q_proj|v_proj", n_voters=3, rank=16)(Reduced(whole))
            _train_in_float32(self.model)
        else:
            names = {n.rpartition(".")[2] for n, m in whole.model.named_modules() if isinstance(m, nn.Linear)}
            self.model = get_peft_model(Reduced(whole), _lora(sorted(names)))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:  # noqa: ARG002
        ids, mask = batch["input_ids"], batch["attention_mask"]
        calling = {"return_risk": False, "training": True} if self.is_vote else {}
        logits = self.model(inputs_embeds=self.embedding(ids), attention_mask=mask, **calling)
        labels = torch.zeros(logits.shape, device=ids.device).scatter_(2, ids[..., None], 1.0)
        keep = mask[:, :-1].bool() & mask[:, 1:].bool()
        return F.cross_entropy(logits[:, :-1][keep], labels[:, 1:][keep])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.model.parameters() if p.requires_grad), lr=RATE)


class Reduced(nn.Module):
    """A language model without its embedding: vectors in, logits out."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.model, self.lm_head = whole.model, whole.lm_head
        self.is_loaded_in_4bit = getattr(whole, "is_loaded_in_4bit", False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = self.lm_head(out.last_hidden_state)
        return logits


class Arm:
    """A LightningModule in a running Trainer that waits for the records of its next step."""

    def __init__(self, module: lightning.LightningModule, collate: Collate, steps: int) -> None:
        self._records: queue.Queue[Sequence[Sequence[Record]]] = queue.Queue()
        self._done: queue.Queue[float | BaseException | None] = queue.Queue()
        self._collate, self._steps, self._tokens = collate, steps, 0
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        self._thread = threading.Thread(target=self._run, args=(module,), daemon=True)
        self._thread.start()
        self._result()  # the Trainer has set everything up and asks for its first batch
        memory.forget_peak()
        self._before = memory.now()

    def step(self, rows: Sequence[Sequence[Record]]) -> tuple[float, int]:
        """Take one step; returns its loss and how many tokens of the batch were no padding."""
        self._records.put(rows)
        loss = self._result()
        assert loss is not None
        return loss, self._tokens

    def peak(self) -> int:
        """Most memory that the steps so far have used beyond the loaded model, bytes."""
        return memory.peak() - self._before

    def _result(self) -> float | None:
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self, module: lightning.LightningModule) -> None:
        arm = self

        class Fed(Dataset[Any]):
            def __len__(self) -> int:
                return arm._steps

            def __getitem__(self, index: int) -> Any:
                if index == 0:
                    arm._done.put(None)
                batch, arm._tokens = arm._collate(arm._records.get())
                return batch

        class Report(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                arm._done.put(float(outputs["loss"]))

        try:
            trainer = lightning.Trainer(
                accelerator="auto", devices=1, precision="bf16-mixed", gradient_clip_val=1.0, max_epochs=1,
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=[Report()],
            )  # fmt: skip
            trainer.fit(module.train(), DataLoader(Fed(), batch_size=None))
        except BaseException as error:
            self._done.put(error)


def _lora(targets: Any) -> LoraConfig:
    return LoraConfig(r=64, lora_alpha=64, lora_dropout=0.0, target_modules=targets)


def _train_in_float32(model: nn.Module) -> None:
    """What trains is kept in float32, as PEFT keeps LoRA: small steps would be lost in bfloat16."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def _pack(model: Any) -> None:
    """Put a frozen nf4 layer in the place of every linear layer but the head."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for parent in list(model.model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = Linear4bit(  # type: ignore[no-untyped-call]
                    layer.in_features, layer.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed.to(layer.weight.device))
    model.is_loaded_in_4bit = True


def _load_code(model: Any) -> None:
    """A step of another optimizer on two tokens: libraries load code when it is first used, which is not a step's."""
    vectors = model.get_input_embeddings()(torch.tensor([[0, 1]], device=model.device))
    trained = nn.Parameter(torch.zeros(1, device=model.device))
    optimizer = torch.optim.Adam([trained])
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(inputs_embeds=vectors + trained, attention_mask=torch.ones(1, 2, device=model.device)).logits
        loss = F.cross_entropy(logits[0].float(), torch.tensor([0, 1], device=model.device))
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([trained], 1.0)
    optimizer.step()
