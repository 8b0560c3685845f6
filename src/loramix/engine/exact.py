"""Which models a packed row serves exactly: by what they are made of, and by trying a few tokens.

The trial costs two steps and two plain forward passes of a few tokens, and compares the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from loramix.base import Base
from loramix.engine.cache import PrefixCache
from loramix.engine.core import Core
from loramix.engine.scheduler import Scheduler, Task
from loramix.errors import EngineError
from loramix.frozen import FrozenLinear
from loramix.mixed import MixedLinear

EXACT_LAYERS = {"full_attention", "sliding_attention"}
CHANGING_ROPE = {"dynamic", "longrope"}  # frequencies that depend on the longest request around


def require_exact(model: PreTrainedModel) -> int:
    """EngineError, naming the model's class and the reason, unless it is served exactly.

    Returns the bytes that a token's keys and values take, as seen in the trial.
    """
    reason, token_bytes = _obstacle(model), 0
    if reason is None:
        reason, token_bytes = _trial(model)
    if reason is not None:
        raise EngineError(
            f"{type(model).__name__} cannot be served exactly: {reason}. Expected a decoder with "
            f"causal attention in every layer and rotary or learned positions; use another base."
        )
    return token_bytes


def exact_context(base: Base) -> int:
    """The most tokens a request may have, where positions mean the same for all requests."""
    config = base.model.config.get_text_config()
    limits = [base.context]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]:
        if rope.get("rope_type") in CHANGING_ROPE:
            limits.append(int(rope.get("original_max_position_embeddings") or base.context))
    return min(limits)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Token ids are less than this."""
    return int(model.config.get_text_config().vocab_size)


def _obstacle(model: PreTrainedModel) -> str | None:
    """What the model is made of that a packed row cannot serve, if anything."""
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - EXACT_LAYERS
    if config.is_encoder_decoder:
        return "it has an encoder"
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    if model._is_stateful or any(weight.dim() > 2 for weight in model.parameters()):
        return "it has recurrent, convolutional or fused-expert layers"
    if not model._supports_attention_backend:
        return "its attention cannot be replaced (it may use ALiBi)"
    if any(isinstance(layer, MixedLinear | FrozenLinear) for layer in model.modules()):
        return "another engine or a training serves it now; close that, or open the base again"
    return None


class _Collector:
    """A reader that keeps all logits."""

    def __init__(self, num_tokens: int) -> None:
        self.rows: list[Tensor] = []
        self._num_tokens = num_tokens

    @property
    def finished(self) -> bool:
        return sum(map(len, self.rows)) == self._num_tokens

    def read(self, logits: Tensor) -> list[int]:
        self.rows.append(logits)
        return []


def _trial(model: PreTrainedModel) -> tuple[str | None, int]:
    """How the packed row's logits differ from the model's own beyond rounding, if they do.

    Also the bytes of a token's keys and values.
    """
    vocabulary = vocabulary_size(model)
    prompts = [[(7 * i + 3 * n) % vocabulary for i in range(n)] for n in (9, 4)]
    token_bytes = 0
    scheduler = Scheduler(PrefixCache(0), max_batch=2, max_queue=2, step_tokens=7)
    core = Core(model, scheduler)
    readers = [_Collector(len(prompt)) for prompt in prompts]
    windows: set[int | None] = set()
    try:
        tasks = [Task(p, 0, (), "", r) for p, r in zip(prompts, readers, strict=True)]
        for task in tasks:
            scheduler.add(task)
        while not scheduler.is_idle:
            batch = scheduler.next_batch()
            logits = core.forward(batch)
            token_bytes = token_bytes or tasks[0].history.token_bytes
            scheduler.record(batch, logits)
            windows |= {window for span in batch.spans for window in span.masks}
        core.close()  # the layers are the model's own again
        with torch.inference_mode():
            own = [model(torch.tensor([p], device=model.device)).logits[0].float() for p in prompts]
    except Exception as error:
        return f"a trial failed with {error!r}", 0
    finally:
        core.close()
    if windows != _windows(model.config.get_text_config()):
        return f"its layers attend over windows of {windows}, other than its config says", 0
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    for logits, reader in zip(own, readers, strict=True):
        off = float((torch.cat(reader.rows) - logits).abs().max() / logits.abs().max())
        if not off <= tolerance:
            return f"in a trial its logits were off by {off:.1e} of the largest", 0
    return None, token_bytes


def _windows(config: PreTrainedConfig) -> set[int | None]:
    """The attention windows that a config promises; None is all tokens."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return {window}
    return {window if kind == "sliding_attention" else None for kind in types}
