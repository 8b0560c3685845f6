"""A model's root-mean-square norms, each as one call (native/norms.c).

Models write a norm as half a dozen small operations, and a small model has a hundred norms: a
seventeenth of a step of one request was theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.native import Native

SAMPLE = (8, 0.01, 100.0)  # rows that are compared, and the least and largest size of their numbers
CLOSE = 2.0**-6  # two units in the last place of bfloat16: there may be two roundings
SAME = 0.99  # of the sample bit for bit; the rest are sums that were about to round either way


@dataclass(frozen=True, slots=True)
class Form:
    """In which two ways norms differ (native/norms.c)."""

    offset: float  # of the weights
    early: bool  # rounded before they are weighed


FORMS = (Form(0, True), Form(1, False), Form(0, False))  # Llama's, Gemma's, OLMo 2's


class FrozenNorm(nn.Module):
    """A norm of bfloat16 rows on the CPU, for inference only."""

    def __init__(self, layer: Any, eps: float, form: Form, native: Native) -> None:
        super().__init__()
        self.weight: Tensor = layer.weight
        self._eps, self._form, self._native = eps, form, native
        self._aside: tuple[nn.Module] = (layer,)

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., D]
        if x.dtype != torch.bfloat16 or x.shape[-1] != len(self.weight):
            plain: Tensor = self._aside[0](x)
            return plain
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._native.normalise(
            x.data_ptr(),
            self.weight.data_ptr(),
            y.data_ptr(),
            x.numel() // width,
            width,
            self._eps,
            self._form.offset,
            self._form.early,
            torch.get_num_threads(),
        )
        return y

    def restored(self) -> nn.Module:
        """The layer as it was."""
        return self._aside[0]


def frozen_norm(layer: nn.Module, native: Native) -> FrozenNorm | None:
    """A layer's norm as one call; None if it is no norm of a form that we know.

    Names promise nothing, so numbers of all sizes are compared.
    """
    parameters = dict(layer.named_parameters())
    weight = parameters.get("weight")
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if not type(layer).__name__.endswith("RMSNorm") or len(parameters) != 1 or weight is None:
        return None
    if weight.dim() != 1 or weight.dtype != torch.bfloat16 or not isinstance(eps, float):
        return None
    x = _sample(weight)
    with torch.inference_mode():
        wanted = layer(x)
        for form in FORMS:
            ours = FrozenNorm(layer, eps, form, native)
            if _agree(ours(x), wanted):
                return ours
    return None


def _sample(weight: Tensor) -> Tensor:
    rows, least, most = SAMPLE
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(rows, len(weight), generator=generator)
    sizes = torch.logspace(math.log10(least), math.log10(most), rows)
    return (numbers * sizes[:, None]).to(weight.dtype)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    same = (found == wanted).float().mean() >= SAME
    return bool(same) and torch.allclose(found.float(), wanted.float(), rtol=CLOSE, atol=0)
