"""Adapters made and saved by PEFT itself, and PEFT's own forward to compare with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model


def save_twin(model: PreTrainedModel, folder: Path, *, seed: int = 0, **config: object) -> Tensor:
    """Save a random adapter with this LoraConfig into `folder`; the logits PEFT gives to PROBE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
            elif "lora_magnitude" in name:
                parameter.data.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        return wrapped.eval()(PROBE).logits.detach()


def load_in_peft(model: PreTrainedModel, folder: Path) -> Tensor:
    """The logits PEFT gives to PROBE with the adapter in `folder`; a warning of its is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(model), folder)(PROBE).logits.detach()


PROBE = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(1))
