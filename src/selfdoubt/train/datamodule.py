"""``InstructionData``: training and validation batches for any number of devices; an interrupted run resumes."""

from __future__ import annotations

from typing import Any

import lightning
from torch.utils.data import DataLoader

from selfdoubt.errors import DataError
from selfdoubt.train.batches import Batch, LengthSortedSampler, StepSampler, build_loader
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.devices import choose_padding
from selfdoubt.train.encode import Splits


class InstructionData(lightning.LightningDataModule):
    """The encoded examples of a run.

    Args:
        splits: Encoded examples, from ``encode.prepare_splits``.
        config: Sizes and seed.
    """

    def __init__(self, splits: Splits, config: TrainConfig) -> None:
        super().__init__()
        self.splits, self.config = splits, config
        self._resume: dict[str, int] | None = None

    def steps(self, world: int | None = None) -> StepSampler:
        """Return the order of this device's training batches; with ``world`` of the first of that many devices."""
        rank, world = self._place() if world is None else (0, world)
        train = self.splits.train.with_format("torch")
        return StepSampler(train["length"][:], train["counted"][:], self.config, rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches; after an interruption the remaining ones of its epoch come first."""
        sampler = self.steps()
        if self._resume is not None:
            sampler.start = self._resume["batches"] % sampler.batches
            self._resume = None
        return build_loader(self.splits.train, sampler, self.config.workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Return the validation batches: every example once.

        Raises:
            DataError: If there are fewer examples than devices.
        """
        if not len(self.splits.val):
            return []
        rank, world = self._place()
        if len(self.splits.val) < world:
            raise DataError(f"{len(self.splits.val)} validation examples on {world} devices; raise val_share")
        lengths = self.splits.val.with_format("torch")["length"][:]
        sampler = LengthSortedSampler(
            lengths, self.config.rows, rank=rank, world=world, padding=choose_padding(self.config),
            limit=self.config.max_length,
        )  # fmt: skip
        return build_loader(self.splits.val, sampler, self.config.workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches that the epoch has done."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"batches": progress.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._resume = state_dict

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
