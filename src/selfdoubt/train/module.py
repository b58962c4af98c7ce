"""The training step as a LightningModule, to be driven by ``fit`` or by a Trainer of your own."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from selfdoubt import sculpt
from selfdoubt.errors import ConfigError, NonFiniteError
from selfdoubt.lm.adapters.lora import leave_casts_to_autocast
from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.members import Wrapped, count_rows, has_base_row
from selfdoubt.rows import expand
from selfdoubt.train.batches import Batch
from selfdoubt.train.compiled import CompiledLayers
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.head import compute_mixture_losses, get_head, run_trunk, sum_losses, sum_sculpted_losses
from selfdoubt.train.optimizer import build_optimizer
from selfdoubt.wrapping import innermost


class RiskAwareModule(lightning.LightningModule):
    """A wrapped (or plain) causal language model with its training and validation steps.

    Every token that counts weighs the same in a step. ``vote``: a batch is split over the voters, so that a step costs
    one pass (``voter_batch="split"``), or repeated for each (``"repeat"``). ``sample``: one pass with fresh noise.
    ``sculpt``: the likelihood of random logits.

    Args:
        model: A wrapped model, or a plain one whose trainable parameters are LoRA's.
        config: The settings; ``config.wrapper`` must be the wrapper of the model.

    Raises:
        ConfigError: If nothing of the model trains, or a sculpt's scale is not that of the output layer.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("nothing of this model trains; wrap it with vote, or give it LoRA")
        if isinstance(config.wrapper, sculpt.Wrapper) and not isinstance(get_head(model), sculpt.ScaledHead):
            raise ConfigError("a language model learns the scale of its output layer; leave sculpt's param_filter out")
        self.model = model
        self.config = config
        self.strict_loading = False  # checkpoints hold what trains, not the frozen base
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self.train_losses: list[float] = []  #: one per step, for the record
        self._batch_losses: list[Tensor] = []  #: of the step so far, on the device
        self._random: dict[str, Any] | None = None
        self._compiled = CompiledLayers(model) if config.compile else None

    @property
    def members(self) -> int:
        """Members at evaluation."""
        return count_rows(self.model)

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Leave the casts of LoRA to autocast, where that is active."""
        leave_casts_to_autocast(self.model, active="mixed" in str(self.trainer.precision))

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Leave the casts to LoRA: without a Trainer nothing runs under autocast."""
        leave_casts_to_autocast(self.model, active=False)

    def configure_model(self) -> None:
        """Shard the decoder blocks and then the rest, under FSDP2; the strategy brings the mesh of devices."""
        mesh = getattr(self, "device_mesh", None)
        base = innermost(self.model)
        if mesh is None or isinstance(base, FSDPModule):  # one device, or sharded before
            return
        blocks = max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
        for module in (*blocks, base):
            fully_shard(module, mesh=mesh["data_parallel"])

    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of the surprisals of the tokens that count, nats."""
        return compute_loss(self.model, self.config, batch)

    def training_step(self, batch: Batch, index: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one batch, scaled so that a step is the mean over all its tokens."""
        # Lightning divides by the accumulated batches, data parallelism by the devices.
        shares = self.config.accumulate * self.trainer.world_size
        loss = self.loss(batch) * (shares / (batch.step_tokens * self.config.voters_per_row))
        self._batch_losses.append(loss.detach())
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Run compiled layers in this step, if the config says so."""
        if self._compiled is not None:
            self._compiled.on()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Run plain layers outside training steps."""
        if self._compiled is not None:
            self._compiled.off()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Check the loss of the step before it changes a weight, and keep it: the sum over batches, mean over devices.

        It is read here, behind the backward pass, so that Python waits for a GPU once per step.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        loss = torch.stack(self._batch_losses).mean()
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"the loss of step {self.global_step} is {loss.item()}; lower lr (now {self.config.lr}), or clip"
            )
        if (self.trainer.fit_loop.epoch_loop.batch_idx + 1) % self.config.accumulate == 0:
            self._batch_losses.clear()
            mean = float(self.trainer.strategy.reduce(loss, reduce_op="mean"))
            self.train_losses.append(mean)
            self.log("train/loss", mean, prog_bar=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass; where activations were not kept, attention runs again, as it ran forward."""
        with steady_attention():
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Batch, index: int) -> None:  # noqa: ARG002
        """Measure the surprisal of each token that counts under the mean of all members, and the accuracy."""
        members = self.members
        rows = _repeat(batch, members)
        with steady_attention():
            head_input = run_trunk(self.model, _build_inputs(self.model, rows), rows.chosen, training=False)
        if has_base_row(self.model):  # which does not train
            head_input = head_input._replace(hidden=head_input.hidden[len(head_input.hidden) // members :])
            members -= 1
        labels = batch.labels.flatten()[batch.chosen]
        nll, right = compute_mixture_losses(head_input, get_head(self.model), labels, members)
        self.val_loss.update(nll.mean(), nll.numel())
        self.val_accuracy.update(right.float().mean(), nll.numel())

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over the whole validation share."""
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Build AdamW for the parameters that train, and the schedule."""
        config = self.config
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(config, trained)
        steps = int(self.trainer.estimated_stepping_batches)

        def share(step: int) -> float:
            rising = min(1.0, (step + 1) / (config.warmup + 1))
            falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
            return rising * (falling if config.schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the parameters that train, and the state of the random generators, so that noise resumes."""
        state = checkpoint["state_dict"]
        if not any(isinstance(value, DTensor) for value in state.values()):  # of shards, all must be there to load
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint["random"] = {"cpu": torch.get_rng_state(), "cuda": cuda}
        checkpoint["train_losses"] = list(self.train_losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the losses so far; the random numbers wait until training starts."""
        self.train_losses = list(checkpoint["train_losses"])
        self._random = checkpoint["random"]

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint."""
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if self._random["cuda"]:
                torch.cuda.set_rng_state_all(self._random["cuda"])
            self._random = None


def compute_loss(model: nn.Module, config: TrainConfig, batch: Batch) -> Tensor:
    """Return the sum of the surprisals of the tokens that count, nats, as a model learns from a batch."""
    voters = config.voters_per_row
    rows = _repeat(batch, voters) if voters > 1 else batch
    with steady_attention():
        head_input = run_trunk(model, _build_inputs(model, rows), rows.chosen, training=voters == 1)
    head, labels = get_head(model), rows.labels.flatten()[rows.chosen]
    if isinstance(head, sculpt.ScaledHead):
        draws = config.draws if config.sculpt_loss == "draws" else None
        distribution = cast(Wrapped, model).distribution
        return sum_sculpted_losses(head_input, head, labels, distribution=distribution, draws=draws)
    return sum_losses(head_input, head, labels)


def _repeat(batch: Batch, members: int) -> Batch:
    """Repeat a batch for every member."""
    firsts = torch.arange(members, device=batch.chosen.device)[:, None] * batch.labels.numel()
    return batch._replace(
        ids=expand(batch.ids, members), positions=expand(batch.positions, members),
        segments=expand(batch.segments, members), labels=expand(batch.labels, members),
        chosen=(firsts + batch.chosen).flatten(),
    )  # fmt: skip


def _build_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the model's inputs; where voters read the answer only, also the positions that predict it."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    mask = batch.mask()
    if mask is not None:
        inputs["attention_mask"] = mask
    if batch.packed:
        inputs["position_ids"] = batch.positions
    if isinstance(model, Wrapped) and getattr(model.spec, "start", "prompt") == "answer":
        inputs["active"] = batch.labels >= 0
    return inputs
