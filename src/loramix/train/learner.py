"""One expert while it learns: its factors, its optimizer, and how far it is."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from loramix.adapter import Adapter, Card
from loramix.errors import TrainError
from loramix.formats.peft import digest
from loramix.linear import matrix_of
from loramix.lora import Pair
from loramix.mixed import MixedModel
from loramix.stacked import Bound
from loramix.train.batches import epoch_order, file_order
from loramix.train.begun import Begun
from loramix.train.config import Settings, every_steps
from loramix.train.data import Row
from loramix.train.scaling import LossScale
from loramix.train.start import fresh_pairs


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well rows are known: nats a learned token, and the share of those that come first.

    The share is the mean of the rows' own, as LLaMA-Factory has it.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Course:
    """What one expert is to learn, and how. Without validation rows its last state is kept."""

    card: Card
    rows: Sequence[Row]
    validation: Sequence[Row]
    settings: Settings
    begun: Begun = field(default_factory=Begun)  # what it begins with beside the base

    def __post_init__(self) -> None:
        if not self.rows:
            raise TrainError(f"{self.card.name!r} has 0 rows to train; expected at least one.")
        if self.settings.patience is not None and not self.validation:
            raise TrainError(
                f"{self.card.name!r} is to stop early but has no validation rows; split some off "
                f"(val_size), or leave early_stopping_steps out."
            )


def account(course: Course, source: str) -> str:
    """What an expert is learned from and how, for its folder; JSON."""
    told = {
        "data": source,
        "rows": len(course.rows),
        "sha256_of_tokens": rows_digest(course.rows),
        "validation_rows": len(course.validation),
        **({"begun_from": course.begun.names} if course.begun.names else {}),
        "steps": course.settings.num_steps(len(course.rows)),
        **{
            name: value
            for name, value in asdict(course.settings).items()
            if value not in (None, math.inf)
        },
    }
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def rows_digest(rows: Sequence[Row]) -> str:
    """The sha256 of rows as tokens and what is learned of them."""
    return hashlib.sha256(repr([(row.ids, row.learned) for row in rows]).encode()).hexdigest()


class Learner:
    """The factors of a course while they are learned, in float32.

    They are kept as LoRA has them, dW = scale * b @ a, and become a plain pair at the end. `beside`
    are factors that act with them and are not learned: minus those (a0, b0) of the base's own
    weight that it started from, so that the update is scale * (b @ a - b0 @ a0), and adapters that
    it is learned over. A pair then has both behind each other, over the base as it is, so that
    experts of one pass can share it.
    """

    def __init__(self, course: Course, mixed: MixedModel) -> None:
        self.course, self.mixed = course, mixed
        settings = course.settings
        self.name = course.card.name
        self.start = self._start()
        self.beside = self._beside()
        self.layers = list(dict.fromkeys([*self.start, *self.beside]))
        self.weights = {
            f"{layer}.{part}": tensor.clone().requires_grad_()
            for layer, pair in self.start.items()
            for part, tensor in (("a", pair.a), ("b", pair.b))
        }
        if settings.dora:
            for layer in self.start:
                self.weights[f"{layer}.magnitude"] = self._magnitude(layer).requires_grad_()
        self.optimizer = self._optimizer()
        self.num_steps = settings.num_steps(len(course.rows))
        self.step = 0
        self.lowest, self.misses = math.inf, 0  # score so far, and validations since
        self.loss_scale = LossScale.of(mixed.model.dtype)
        self.best: dict[str, Tensor] = {}
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        mixed.bind(Adapter(self.name, {**self.beside, **self.start}, "", course.card))
        self.bind()

    @property
    def is_done(self) -> bool:
        patience = self.course.settings.patience
        return self.step >= self.num_steps or (patience is not None and self.misses >= patience)

    @property
    def gate(self) -> float:
        """The weight that its rows give its update; DoRA has the scale inside."""
        return 1.0 if self.course.settings.dora else self.course.settings.scale

    @property
    def is_remade(self) -> bool:
        """Whether its update must be bound anew for every forward pass."""
        return self.course.settings.dora or bool(self.beside)

    def bind(self) -> None:
        """Give the layers the update as it is now, with the graph that leads to its factors."""
        for name in self.layers:
            self.mixed.layers[name].take(self.name, self._bound(name))

    def rows(self) -> list[Row]:
        """Those of the step that comes next."""
        settings, rows = self.course.settings, self.course.rows
        epoch, place = divmod(self.step, settings.steps_per_epoch(len(rows)))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return [rows[i] for i in self._epoch[1][place]]

    def _order(self, epoch: int) -> list[list[int]]:
        settings, rows = self.course.settings, self.course.rows
        if not settings.shuffled:
            return file_order(len(rows), settings.batch_size)
        lengths = [len(row.ids) for row in rows]
        return epoch_order(lengths, settings.batch_size, settings.seed, epoch)

    def advance(self) -> tuple[float, float]:
        """One optimizer step with the gradient that has come together: its norm, and the rate."""
        settings = self.course.settings
        self.loss_scale.undo(self.weights.values())
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), settings.max_norm))
        if not math.isfinite(norm):
            raise TrainError(
                f"The gradient of {self.name!r} became {norm} at step {self.step + 1}; lower its "
                f"learning rate."
            )
        rate = settings.rate_at(self.step, self.num_steps)
        for group, ratio in zip(self.optimizer.param_groups, (1.0, settings.b_ratio), strict=True):
            group["lr"] = rate * ratio
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return norm, rate

    def gradient_is_lost(self) -> bool:
        """Whether 16 bits could not hold its gradient: it is forgotten, to be taken anew."""
        lost = self.loss_scale.lowered(self.weights.values())
        if lost:
            self.optimizer.zero_grad()
        return lost

    @property
    def is_due(self) -> bool:
        """Whether it is to be validated, and kept, after the step it just made."""
        settings = self.course.settings
        per_epoch = settings.steps_per_epoch(len(self.course.rows))
        every = every_steps(settings.validate_every or per_epoch, self.num_steps)
        return self.step % every == 0 or self.step == self.num_steps

    def judged(self, found: Judgement) -> None:
        """Remember the state if no earlier one was better on the validation rows."""
        by_loss = self.course.settings.best_by == "loss"
        score = found.loss if by_loss else -found.accuracy
        if score < self.lowest:
            self.lowest, self.misses = score, 0
            if self.course.settings.keep_best:
                self.best = {n: w.detach().clone() for n, w in self.weights.items()}
        else:
            self.misses += 1

    def adapter(self) -> Adapter:
        """The expert: plain pairs, the scale inside."""
        weights = self.best or self.weights
        pairs = {name: self._pair(name, weights) for name in self.layers}
        return Adapter(self.name, pairs, digest(pairs), self.course.card)

    def _pair(self, layer: str, weights: dict[str, Tensor]) -> Pair:
        scale = self.course.settings.scale
        a, b = (part.detach() for part in self._factors(layer, weights))
        magnitude = weights[f"{layer}.magnitude"].detach() if self.course.settings.dora else None
        return Pair(a.clone(), scale * b, magnitude)

    def _factors(self, layer: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(a, b) of a layer, what is learned before what is not; the scale is still to come."""
        learned = [(weights[f"{layer}.a"], weights[f"{layer}.b"])] if layer in self.start else []
        fixed = [(self.beside[layer].a, self.beside[layer].b)] if layer in self.beside else []
        if len(parts := learned + fixed) == 1:
            return parts[0]
        return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)

    def _bound(self, layer: str) -> Bound:
        a, b = self._factors(layer, self.weights)
        if self.course.settings.dora:
            # the norm is a constant to the gradient: section 4.3 of arxiv.org/abs/2402.09353
            b = self.course.settings.scale * b
            weight = matrix_of(self.mixed.layers[layer].base).float()
            norm = torch.linalg.vector_norm(weight + b.detach() @ a.detach(), dim=1)
            gain = self.weights[f"{layer}.magnitude"] / norm
            return Bound(a, gain[:, None] * b, gain - 1)
        return Bound(a, b, None)

    def _start(self) -> dict[str, Pair]:
        settings, begun = self.course.settings, self.course.begun.pairs
        if begun:
            return self._unscaled(begun)
        fresh = fresh_pairs(
            self.mixed.model,
            settings.targets,
            settings.rank,
            start=settings.start,
            seed=settings.seed,
        )
        if settings.start == "pissa":  # scale * b0 @ a0 is the principal part of W itself
            root = math.sqrt(settings.scale)
            return {n: Pair(p.a / root, p.b / root) for n, p in fresh.items()}
        return fresh

    def _beside(self) -> dict[str, Pair]:
        if self.course.settings.start != "default":
            return {name: Pair(pair.a, -pair.b) for name, pair in self.start.items()}
        return self._unscaled(self.course.begun.below)

    def _unscaled(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """Pairs where the base lies, in float32, as they are before this expert's scale."""
        device, scale = self.mixed.model.device, self.course.settings.scale
        moved = {name: pair.to(torch.float32, device) for name, pair in pairs.items()}
        return {n: Pair(p.a, p.b / scale, p.magnitude) for n, p in moved.items()}

    def _magnitude(self, layer: str) -> Tensor:
        """DoRA's, as it begins: the norms of the base's outputs, or those it has learned."""
        begun = self.start[layer].magnitude
        if begun is not None:
            return begun.clone()
        matrix = matrix_of(self.mixed.model.get_submodule(layer)).detach().float()
        norm: Tensor = torch.linalg.vector_norm(matrix, dim=1)
        return norm

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.course.settings
        slow = [w for n, w in self.weights.items() if n.endswith(".a")]
        fast = [w for n, w in self.weights.items() if not n.endswith(".a")]
        groups = [{"params": slow}, {"params": fast}]
        if settings.optimizer == "sgd":
            return torch.optim.SGD(
                groups,
                lr=settings.rate,
                weight_decay=settings.weight_decay,
                momentum=settings.betas[0],
            )
        options: dict[str, Any] = {
            "lr": settings.rate,
            "betas": settings.betas,
            "weight_decay": settings.weight_decay,
        }
        if settings.optimizer == "adamw8bit":
            return _adamw8bit()(groups, **options)  # type: ignore[no-any-return]
        return torch.optim.AdamW(groups, fused=True, **options)


def _adamw8bit() -> Any:
    """AdamW of bitsandbytes, which remembers in eight bits (https://arxiv.org/abs/2110.02861)."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel not needed here
    try:
        import bitsandbytes
    except ImportError as error:
        raise TrainError(
            "AdamW in eight bits needs bitsandbytes; `pip install 'loramix[quant]'`, or take "
            "optim: adamw_torch."
        ) from error
    untyped: Any = bitsandbytes
    return untyped.optim.AdamW8bit
