"""The progress of a run for TensorBoard, under the names that transformers' Trainer gives it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramix.errors import TrainError
from loramix.train.config import every_steps

if TYPE_CHECKING:
    from loramix.train.loop import Progress


class Board:
    """Event files in a folder, a TensorBoard run an expert.

    A run that is taken up again opens a further file there, which takes back what was written from
    its first step on: nobody sees a step twice. TrainError without tensorboard.
    """

    def __init__(self, folder: Path, *, every: float = 10) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError(
                "report_to: tensorboard needs tensorboard; pip install 'loramix[tensorboard]', or "
                "leave it out."
            ) from error
        self.folder, self.every = folder, every
        self._open: Any = SummaryWriter
        self._writers: dict[str, Any] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.name not in self._writers:
            place = self.folder / progress.name
            self._writers[progress.name] = self._open(str(place), purge_step=progress.step)
        told = {}
        if progress.validation is not None:
            told["eval/loss"] = progress.validation
        if progress.accuracy is not None:
            told["eval/accuracy"] = progress.accuracy
        every = every_steps(self.every, progress.num_steps)
        if progress.step == progress.num_steps or progress.step % every == 0:
            told |= {
                "train/loss": progress.loss,
                "train/learning_rate": progress.rate,
                "train/grad_norm": progress.norm,
                "train/epoch": progress.epoch,
            }
        writer = self._writers[progress.name]
        for tag, value in told.items():
            writer.add_scalar(tag, value, progress.step)
        writer.flush()  # before a checkpoint makes these steps past

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
