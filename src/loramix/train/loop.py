"""The training loop: several experts learned in one pass over one frozen base.

    round:  one optimizer step of every expert that is not done
    micro-batch:  rows of several experts, each under its own gates

The base is multiplied once for all rows; everything else is each expert's own: its factors, its
rows and their order, rate, gradient norm, optimizer, validation and end. So an expert learned with
others is the expert learned alone, up to float rounding. Its loss is the mean over the learned
tokens of its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from loramix.adapter import Adapter
from loramix.base import Base
from loramix.errors import TrainError
from loramix.mixed import MixedModel
from loramix.train.batches import Batch, micro_batches
from loramix.train.checkpoint import Checkpoints
from loramix.train.config import Run, every_steps
from loramix.train.data import Row, total_learned
from loramix.train.forward import (
    check_packing,
    gates,
    judged_batches,
    known,
    losses,
    recomputed,
)
from loramix.train.learner import Course, Judgement, Learner
from loramix.train.memory import LEVERS
from loramix.train.noise import disturbed
from loramix.train.processes import Processes
from loramix.train.sharding import check_shardable, in_step, shard

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one expert is; given to the caller after each of its optimizer steps."""

    name: str
    step: int
    num_steps: int
    loss: float  # nats per learned token, of this step's rows
    rate: float
    norm: float  # of the gradient, before it was clipped
    epoch: float
    tokens_per_s: float  # of all experts together
    validation: float | None = None  # nats per learned token, when just measured
    accuracy: float | None = None  # and the share of those tokens that were the likeliest


class Stopped(TrainError):
    """Training was asked to stop; its state is in the checkpoint and it can be taken up again."""


def train(
    base: Base,
    courses: Sequence[Course],
    run: Run | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[Adapter]:
    """Learn an expert for each course, all in one pass, and return them in order.

    The base is wrapped while they learn and given back as it was, frozen; one that is to be spread
    over the processes stays so. With a folder in `run` the newest checkpoint there is taken up
    again; in float32 on a CPU the result is then the same to the bit. Raises TrainError if there is
    nothing to learn or a loss stops being a number, and Stopped.
    """
    names = [course.card.name for course in courses]
    if not names or len(set(names)) < len(names):
        raise TrainError(f"Expected experts of different names; got {', '.join(names) or 'none'}.")
    run = run or Run()
    if run.sharded:
        check_shardable({course.card.name: course.settings for course in courses})
        shard(base)
    if run.packing:
        check_packing(base.model)
    mixed = MixedModel(base.model)
    with torch.random.fork_rng(devices=[]):
        try:
            learners = [Learner(course, mixed) for course in courses]
            _Pass(base, mixed, learners, run, report).learn()
        finally:
            mixed.release()
    return [learner.adapter() for learner in learners]


@dataclass
class _Pass:
    """One run of the loop over learners that are ready."""

    base: Base
    mixed: MixedModel
    learners: Sequence[Learner]
    run: Run
    report: Callable[[Progress], None]
    round: int = 0
    tokens: int = 0
    micro_tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def learn(self) -> None:
        self.micro_tokens = self.run.micro_tokens
        checkpoints = Checkpoints.of(self.run, self.base, self.learners)
        self.round = checkpoints.restore(self.run.resume_from) if checkpoints else 0
        while living := [learner for learner in self.learners if not learner.is_done]:
            due = self._round(living)
            self.round += 1
            stopped = self.run.processes.any(self.run.stopped())
            if self.run.save_every:
                most = max(learner.num_steps for learner in self.learners)
                due = self.round % every_steps(self.run.save_every, most) == 0
            over = all(learner.is_done for learner in self.learners)
            if checkpoints and (stopped or due or over):
                if self.run.processes.is_first:
                    checkpoints.save(self.round)
                self.run.processes.wait()
            if stopped and not over:
                kept = f"its state is in {self.run.folder}" if checkpoints else "nothing was kept"
                raise Stopped(f"Training was stopped after round {self.round}; {kept}.")

    def _round(self, living: Sequence[Learner]) -> bool:
        """One step of each; whether any of them has reached the end of an epoch or the like."""
        # of dropout: a run that is taken up again draws the same, other processes draw others
        torch.manual_seed(self.round + (self.run.processes.number << 32))
        steps = [learner.rows() for learner in living]
        means = self._finite(living, steps)
        self.tokens += sum(len(row.ids) for step in steps for row in step)
        due = False
        for learner, loss in zip(living, means, strict=True):
            norm, rate = learner.advance()
            progress = self._progress(learner, loss, norm, rate)
            due |= learner.is_due
            if learner.is_due and learner.course.validation:
                found = validated(self.mixed, learner, self.run)
                learner.judged(found)
                progress = replace(progress, validation=found.loss, accuracy=found.accuracy)
            self.report(progress)
        return due

    def _finite(self, living: Sequence[Learner], steps: Sequence[Sequence[Row]]) -> Sequence[float]:
        """The mean losses; gradients that 16 bits could not hold are taken anew, scaled less."""
        means = list(self._gradients(living, steps))
        while lost := [k for k, learner in enumerate(living) if learner.gradient_is_lost()]:
            again = self._gradients([living[k] for k in lost], [steps[k] for k in lost])
            for k, mean in zip(lost, again, strict=True):
                means[k] = mean
        return means

    def _gradients(
        self, living: Sequence[Learner], steps: Sequence[Sequence[Row]]
    ) -> Sequence[float]:
        """The mean loss of each expert's step, its gradient taken; smaller batches if need be."""
        while True:
            try:
                run = replace(self.run, micro_tokens=self.micro_tokens)
                return gradients(self.mixed, living, steps, run)
            except RuntimeError as error:
                if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                    raise
                self._shrink(living, steps)

    def _shrink(self, living: Sequence[Learner], steps: Sequence[Sequence[Row]]) -> None:
        longest = max(len(row.ids) for step in steps for row in step)
        if self.run.sharded:  # the others would wait for as many batches as before
            raise TrainError(f"Out of memory; {LEVERS}.") from None
        if self.micro_tokens <= longest:
            raise TrainError(f"Out of memory with one row of {longest} tokens; {LEVERS}.") from None
        self.micro_tokens = max(longest, self.micro_tokens // 2)
        for learner in living:
            learner.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _progress(self, learner: Learner, loss: float, norm: float, rate: float) -> Progress:
        rows, settings = len(learner.course.rows), learner.course.settings
        return Progress(
            name=learner.name,
            step=learner.step,
            num_steps=learner.num_steps,
            loss=loss,
            rate=rate,
            norm=norm,
            epoch=learner.step / settings.steps_per_epoch(rows),
            tokens_per_s=self.tokens / (time.monotonic() - self.began),
        )


def gradients(
    mixed: MixedModel, learners: Sequence[Learner], steps: Sequence[Sequence[Row]], run: Run
) -> list[float]:
    """Add each expert's gradient to its factors; the mean loss of its step, in nats a token.

    Each process computes its part of the rows, and all of them have the whole gradient then.
    """
    counts = [total_learned(step) for step in steps]
    sums = [0.0] * len(learners)
    batches = micro_batches(
        [run.processes.part(step) for step in steps],
        tokens=run.micro_tokens,
        rows=run.micro_rows,
        packing=run.packing,
    )
    if run.sharded:
        batches = in_step(batches, len(steps), run.processes)
    for batch in batches:
        parts = _backward(mixed, learners, batch, counts, run)
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    sums = run.processes.totals(sums)
    _add_gradients(learners, run.processes)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    for learner, mean in zip(learners, means, strict=True):
        if not math.isfinite(mean):
            raise TrainError(
                f"The loss of {learner.name!r} became {mean} at step {learner.step + 1}; lower the "
                f"learning rate{', or take bf16' if learner.loss_scale.value > 1 else ''}."
            )
    return means


def _add_gradients(learners: Sequence[Learner], processes: Processes) -> None:
    """Sum them over the processes; one that had no row of an expert has none of it."""
    weights = [weight for learner in learners for weight in learner.weights.values()]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    processes.add([weight.grad for weight in weights if weight.grad is not None])


def _backward(
    mixed: MixedModel, learners: Sequence[Learner], batch: Batch, counts: Sequence[int], run: Run
) -> list[float]:
    for learner, count in zip(learners, batch.counts, strict=True):
        if count and learner.is_remade:
            learner.bind()
    active = mixed.active.using(*gates(learners, batch.counts, learning=True))
    saving = recomputed(mixed.model) if run.checkpointing else nullcontext()
    with disturbed(mixed.model, learners, batch), saving, active:
        over = [count / one.loss_scale.value for one, count in zip(learners, counts, strict=True)]
        return _summed(mixed, batch, over, run)


def _summed(mixed: MixedModel, batch: Batch, counts: Sequence[float], run: Run) -> list[float]:
    parts = losses(mixed, batch, bf16=run.bf16)
    here = [
        part / count for part, count, rows in zip(parts, counts, batch.counts, strict=True) if rows
    ]
    torch.stack(here).sum().backward()  # type: ignore[no-untyped-call]
    return torch.stack(parts).detach().tolist()


@torch.no_grad()
def validated(mixed: MixedModel, learner: Learner, run: Run) -> Judgement:
    """How well a course's validation rows are known, a part of them judged in each process."""
    rows = learner.course.validation
    if learner.is_remade:
        learner.bind()
    loss = accuracy = 0.0
    batches = judged_batches(mixed.model, run.processes.part(rows))
    if run.sharded:
        batches = in_step(batches, 1, run.processes)
    for batch in batches:
        with mixed.active.using(*gates([learner], batch.counts, learning=False)):
            parts = known(mixed, batch, bf16=run.bf16)
        loss, accuracy = loss + parts[0], accuracy + parts[1]
    loss, accuracy = run.processes.totals([loss, accuracy])
    return Judgement(loss / total_learned(rows), accuracy / len(rows))
