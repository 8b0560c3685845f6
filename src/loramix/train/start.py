"""Where an expert begins: fresh factors for the layers it is to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from loramix.errors import TrainError
from loramix.linear import matrix_of
from loramix.lora import Pair
from loramix.mixed import linear_shapes

OUTPUT_LAYERS = ("lm_head", "embed_out")
ALL = ("all", "all-linear")


def chosen_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(O, D) of the layers that an expert changes; TrainError for a target that names none.

    A target is the end of a layer's name ("q_proj", "self_attn.q_proj"), or "all-linear", as
    attention alone learns worse at equal size. The output layer is never one: it is given the
    learned tokens of all rows, and no longer knows whose they are.
    """
    shapes = linear_shapes(model)
    inner = {n: s for n, s in shapes.items() if n.rpartition(".")[2] not in OUTPUT_LAYERS}
    if set(targets) & set(ALL):
        return inner
    for target in targets:
        if not any(_ends(name, target) for name in inner):
            known = sorted({name.rpartition(".")[2] for name in inner})
            raise TrainError(
                f"No linear layer of this base is called {target!r}; expected all-linear or some "
                f"of {', '.join(known)}."
            )
    return {n: s for n, s in inner.items() if any(_ends(n, target) for target in targets)}


def fresh_pairs(
    model: nn.Module, targets: Sequence[str], rank: int, *, start: str = "default", seed: int = 0
) -> dict[str, Pair]:
    """Factors to learn from, in float32 where the base lies.

    "default": a Kaiming-uniform, b zero (https://arxiv.org/abs/2106.09685, as in its reference
    code). "pissa": the principal singular vectors of W (https://arxiv.org/abs/2404.02948); "olora":
    its QR factors (https://arxiv.org/abs/2406.01847). Those two change nothing at first only once
    the same product is taken off again, which `Learner` does.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (out, into) in chosen_layers(model, targets).items():
        layer = model.get_submodule(name)
        device = next(chain(layer.parameters(), layer.buffers())).device
        if start == "default":
            bound = 1 / math.sqrt(into)
            a = torch.empty(rank, into).uniform_(-bound, bound, generator=generator)
            b = torch.zeros(out, rank)
        else:
            a, b = _principal(matrix_of(layer).detach().float().cpu(), rank, start)
        pairs[name] = Pair(a.to(device), b.to(device))
    return pairs


def _principal(weight: Tensor, rank: int, start: str) -> tuple[Tensor, Tensor]:
    if rank > min(weight.shape):
        raise TrainError(
            f"{start} cannot start at rank {rank} for a layer of {tuple(weight.shape)}."
        )
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
