"""Fine-tune a Llama 3 whose every token carries a risk: the flow of the published tutorial, in one file.

The model is a small module from embedded tokens to logits; a wrapper makes it risk-aware, and a LightningModule of your
own trains it. (`selfdoubt train` does all of this in one command; this file is for those who want to see the calls.)

    pip install "selfdoubt[train,quant]"
    python examples/llama3_tutorial.py                                  # offline, about a minute on a CPU
    python examples/llama3_tutorial.py --wrapper sculpt --steps 20
    HF_TOKEN=... python examples/llama3_tutorial.py --model meta-llama/Llama-3.2-3B --data yahma/alpaca-cleaned

Llama 3 is gated: accept its licence on its page, and give a token of your account in HF_TOKEN. The pocket model, the
default, has never met this prompt, and 200 steps are few: its answers show doubt rather than knowledge.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import datasets
import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import selfdoubt
from selfdoubt import pocket, sample, sculpt, vote
from selfdoubt.errors import ConfigError, LoadError, SelfdoubtError, require
from selfdoubt.lm.load import load_model

WRAPPERS: dict[str, Any] = {
    "vote": vote.EagerWrapper(
        param_filter="q_proj|v_proj", n_voters=3, finetune=True, verbose=2, weight_noise=0.2, alpha=1
    ),
    "sample": sample.Wrapper(symbolic_trace=False, n_samples=5, verbose=2),
    "sculpt": sculpt.Wrapper(symbolic_trace=False, n_layers=2, verbose=2, distribution=sculpt.Normal),
    "none": None,
}
BATCH = 3  # the number of voters, so that each reads one example of a batch; any multiple of it would do
LONGEST = 400  # tokens of an example
EPOCHS, RATE = 5, 2e-4
QUESTION = "What is the capital of France?"

INTRODUCTION = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def prompt(record: dict[str, str]) -> str:
    """The Alpaca prompt of a record, up to where the response begins."""
    if record.get("input"):
        head = f"{INTRODUCTION}, paired with an input that provides further context. {REQUEST}"
        task = f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}"
    else:
        head = f"{INTRODUCTION}. {REQUEST}"
        task = f"### Instruction:\n{record['instruction']}"
    return f"{head}\n\n{task}\n\n### Response:\n"


def geography(file: Path) -> datasets.Dataset:
    """The pocket model's own questions about places it has read about, every other one as an input."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    records = []
    for row in rows:
        if row["category"] in ("known", "rare"):
            as_input = len(records) % 2 == 1
            records.append({
                "instruction": "Answer a question about geography." if as_input else row["question"],
                "input": row["question"] if as_input else "",
                "output": row["answers"][0],
            })  # fmt: skip
    return datasets.Dataset.from_list(records)


def load_data(source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Records to train and to validate on.

    ``datasets`` keeps them in an Arrow table that loader processes share: nothing is copied, as a Python list would be.
    """
    if source == "geography":
        # The questions that evaluate the pocket model only validate here.
        return geography(pocket.reference_file()), geography(pocket.evaluation_file()).select(range(24))
    is_file = Path(source).suffix in (".json", ".jsonl")
    if is_file and not Path(source).is_file():
        raise LoadError(f"there is no file {source}; give alpaca_data.json, or a name such as yahma/alpaca-cleaned")
    try:
        options = {"path": "json", "data_files": source} if is_file else {"path": source}
        records = datasets.load_dataset(**options, split="train")
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise LoadError(f"{source} cannot be loaded ({type(error).__name__}: {text})") from error
    missing = {"instruction", "output"} - set(records.column_names)
    if missing or len(records) < 2 * BATCH:
        raise ConfigError(
            f"{source} needs the columns instruction, input and output and at least {2 * BATCH} rows, "
            f"got {', '.join(records.column_names)} and {len(records)} rows"
        )
    split = records.train_test_split(test_size=max(BATCH, min(1000, len(records) // 50)), seed=0)
    return split["train"], split["test"]


class Reduced(nn.Module):
    """A language model without its embedding and cache: embedded tokens in, logits out."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.model = whole.model
        self.lm_head = whole.lm_head

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        return self.lm_head(out.last_hidden_state)


def quantize(model: Reduced) -> None:
    """Put a frozen nf4 layer in the place of every linear layer but the head."""
    bitsandbytes = require("bitsandbytes", "quant")
    for parent in list(model.model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
                )  # fmt: skip
                packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                packed.bias = layer.bias
                # On some CPUs a pass without gradients, such as a validation, repacks the weights for good, and no
                # gradient comes through them any more.
                packed.support_avx512bf16_for_cpu = False
                setattr(parent, name, packed.to(layer.weight.device).requires_grad_(False))
    model.is_loaded_in_4bit = True  # where PEFT looks


def prepare(name: str, wrapper: str, *, in_4_bits: bool) -> tuple[Any, nn.Module, nn.Module]:
    """The tokenizer, the embedding, and the model that a wrapper can take, or that trains as it is for "none"."""
    whole, tokenizer = load_model(name)
    if not (hasattr(whole, "model") and hasattr(whole, "lm_head")):
        raise ConfigError(f"{name} is {type(whole).__name__}, which has no model and lm_head; take a Llama")
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # an end of text that is padding is no end
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "left"
    if len(tokenizer) > whole.config.vocab_size:
        whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole.requires_grad_(False)
    model = Reduced(whole)
    if in_4_bits:
        quantize(model)
    if wrapper != "vote":
        # Voters bring weights of their own that train; the others learn by LoRA.
        from peft import LoraConfig, get_peft_model  # slow, and not quiet: after what can go wrong

        layers = {n.rpartition(".")[2] for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
        config = LoraConfig(r=64, lora_alpha=64, lora_dropout=0.0, target_modules=sorted(layers))
        model = get_peft_model(model, config)
    return tokenizer, whole.get_input_embeddings(), model


def choose_wrapper(name: str, *, in_4_bits: bool) -> Any:
    """The wrapper of that name; None for "none"."""
    if name == "vote" and in_4_bits:
        # A full deviation has the shape of the weight it is added to. Four-bit weights are packed two to a byte, in
        # blocks with scales of their own: they have no such shape, and nothing can be added to them. A low-rank
        # deviation only meets the layer's input and output. So with voters a model is quantised first and wrapped then
        # (wrapped first, the full deviations would stay, at 16 times the memory of what was just saved).
        return replace(WRAPPERS["vote"], rank=16)
    return WRAPPERS[name]


class RiskAware(lightning.LightningModule):
    """Trains a wrapped model on text; the embedding stays outside of it."""

    def __init__(self, tokenizer: Any, embedding: nn.Module, wrapped: nn.Module, wrapper: Any) -> None:
        super().__init__()
        self.tokenizer, self.embedding, self.wrapped, self.wrapper = tokenizer, embedding, wrapped, wrapper
        self.accuracy = MulticlassAccuracy(len(tokenizer), average="micro")
        self.strict_loading = False
        for p in wrapped.parameters():
            if p.requires_grad:  # small steps would be lost in a bfloat16 weight
                p.data = p.data.float()

    def collate(self, records: list[dict[str, str]]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest of these records; padding to 400 would be mostly padding."""
        texts = [prompt(r) + r["output"] + self.tokenizer.eos_token for r in records]
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        encoded = self.tokenizer(texts, **options)
        return {"ids": encoded["input_ids"], "mask": encoded["attention_mask"]}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:  # noqa: ARG002
        inputs = self._inputs(batch)
        if isinstance(self.wrapper, (vote.Wrapper, vote.EagerWrapper)):
            logits = self.wrapped(**inputs, return_risk=False, training=True)  # each voter reads its own share
        elif isinstance(self.wrapper, sculpt.Wrapper):
            y, risk = self.wrapped(**inputs, return_risk=True)
            logits = self.wrapper.distribution.sample((y, risk))
        elif isinstance(self.wrapper, sample.Wrapper):
            logits = self.wrapped(**inputs, return_risk=False)
        else:
            logits = self.wrapped(**inputs)
        loss = F.cross_entropy(*_next_tokens(logits, batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:  # noqa: ARG002
        logits, labels = _next_tokens(self.wrapped(**self._inputs(batch)), batch)  # the mean over members
        self.accuracy(logits.argmax(-1), labels)
        self.log("val/loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels))
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.wrapped.parameters()), lr=RATE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains; the frozen gigabytes are where they came from."""
        names = {n for n, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in names}

    @torch.no_grad()
    def answer(self, question: str, most: int = 12) -> list[tuple[str, float, float | None]]:
        """A greedy answer: each token's text, probability, and risk (that of its own logit)."""
        ids = self.tokenizer(prompt({"instruction": question}), return_tensors="pt")["input_ids"].to(self.device)
        tokens: list[tuple[str, float, float | None]] = []
        while len(tokens) < most:
            inputs = self._inputs({"ids": ids, "mask": torch.ones_like(ids)})
            if self.wrapper is None:
                y, risk = self.wrapped(**inputs), None
            else:
                y, risk = self.wrapped(**inputs, return_risk=True, training=False)
            best = int(y[0, -1].argmax())
            probability = float(y[0, -1].float().softmax(-1)[best])
            own_risk = None if risk is None else float(risk[0, -1, best])
            tokens.append((self.tokenizer.decode([best]), probability, own_risk))
            if best == self.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, ids.new_tensor([[best]])], 1)
        return tokens

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"inputs_embeds": self.embedding(batch["ids"]), "attention_mask": batch["mask"]}


def _next_tokens(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and the token that follows, where both are text.

    A label is an index. As a one-hot row of floats it would say the same in 128,257 numbers, half a megabyte a token,
    for a loss that reads one of them.
    """
    keep = batch["mask"][:, :-1].bool() & batch["mask"][:, 1:].bool()
    return logits[:, :-1][keep], batch["ids"][:, 1:][keep]


def train(module: RiskAware, data: tuple[datasets.Dataset, datasets.Dataset], options: argparse.Namespace) -> None:
    """Train, and put the weights with the best validation loss back in place."""
    on_gpu = torch.cuda.is_available()
    loading = {
        "batch_size": BATCH,
        "collate_fn": module.collate,
        "num_workers": 4 if on_gpu else 0,
        "pin_memory": on_gpu,
    }
    batches = DataLoader(data[0], shuffle=True, drop_last=True, **loading)
    checkpoint = ModelCheckpoint(options.out / "checkpoints", monitor="val/loss", save_weights_only=True)
    logger = WandbLogger(save_dir=options.out) if options.wandb else CSVLogger(options.out, "logs", "")
    steps = options.steps or EPOCHS * len(batches)
    # On several devices: devices=8, strategy="ddp" ("ddp_notebook" in a notebook).
    trainer = lightning.Trainer(
        accelerator="auto", devices=1, precision="bf16-mixed", gradient_clip_val=1.0,
        max_epochs=EPOCHS, max_steps=steps, limit_train_batches=min(len(batches), steps),
        val_check_interval=0.25, num_sanity_val_steps=0, log_every_n_steps=1, logger=logger,
        callbacks=[checkpoint, LearningRateMonitor("step")], enable_model_summary=False, default_root_dir=options.out,
    )  # fmt: skip
    trainer.fit(module, batches, DataLoader(data[1], **loading))
    best = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best["state_dict"], strict=False)
    print(f"best val/loss: {float(checkpoint.best_model_score):.4f}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"llama3_tutorial: {message}\n")


def read_options() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="a folder, a hub name, or pocket (default)")
    parser.add_argument("--data", default="geography", help="alpaca_data.json, a hub name, or geography (default)")
    parser.add_argument("--wrapper", default="vote", choices=list(WRAPPERS))
    parser.add_argument("--steps", type=int, help="end after so many steps; default 200 for geography, else 5 epochs")
    parser.add_argument(
        "--quantize", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="4-bit weights; the default on a GPU",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/llama3-tutorial"), help="where everything is written")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases instead of a CSV file")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.wandb and find_spec("wandb") is None:
        parser.error("--wandb needs a package that is not installed: pip install wandb")
    if options.steps is None and options.data == "geography":
        options.steps = 200
    return options


def main() -> None:
    options = read_options()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data = load_data(options.data)
    lightning.seed_everything(0, verbose=False)
    tokenizer, embedding, model = prepare(options.model, options.wrapper, in_4_bits=options.quantize)
    wrapper = choose_wrapper(options.wrapper, in_4_bits=options.quantize)
    wrapped = model if wrapper is None else wrapper(model)
    module = RiskAware(tokenizer, embedding, wrapped, wrapper)
    device = embedding.weight.device
    train(module, data, options)
    adapter = options.out / "adapter"
    if wrapper is None:
        wrapped.save_pretrained(adapter, save_embedding_layers=False)  # plain LoRA, in PEFT's own format
    else:
        selfdoubt.save(wrapped, adapter, base=options.model)  # put it back with selfdoubt.load(adapter, model)
    print(f"saved: {adapter}\n\n{QUESTION}\n{'token':<16}{'probability':>12}{'risk':>10}")
    for text, probability, risk in module.to(device).eval().answer(QUESTION):
        print(f"{text!r:<16}{probability:>12.3f}" + ("" if risk is None else f"{risk:>10.4f}"))


def run() -> None:
    """``main``, with what goes wrong in one line."""
    try:
        main()
    except SelfdoubtError as error:
        Parser().error(" ".join(str(error).split()))


if __name__ == "__main__":
    run()
