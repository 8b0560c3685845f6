"""The keys of a training file: LLaMA-Factory's, and what becomes of each.

Honoured keys mean what they mean there, with the same defaults. Those of other stages, or that
cannot change anything here, are passed over with a note; those that would change the result in a
way that is not offered are refused. A key that is none of these is an error with the nearest name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from loramix.errors import TrainError

# of one expert: each may also stand under `experts: {name: ...}`
OF_EXPERT: dict[str, type] = {
    "data": str,
    "eval_data": str,
    "dataset": str,
    "eval_dataset": str,
    "description": str,
    "preset": str,
    "lora_rank": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "neftune_noise_alpha": float,
    "lora_target": str,
    "use_rslora": bool,
    "use_dora": bool,
    "pissa_init": bool,
    "olora_init": bool,
    "loraplus_lr_ratio": float,
    "max_samples": int,
    "val_size": float,
    "learning_rate": float,
    "num_train_epochs": float,
    "max_steps": int,
    "lr_scheduler_type": str,
    "warmup_ratio": float,
    "warmup_steps": float,
    "max_grad_norm": float,
    "weight_decay": float,
    "optim": str,
    "adam_beta1": float,
    "adam_beta2": float,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "eval_strategy": str,
    "eval_steps": float,
    "load_best_model_at_end": bool,
    "early_stopping_steps": int,
    "seed": int,
}
# of the run as a whole
OF_RUN: dict[str, type] = {
    "model_name_or_path": str,
    "model_revision": str,
    "dataset_dir": str,
    "output_dir": str,
    "overwrite_output_dir": bool,
    "library": str,
    "name": str,
    "fit_router": bool,
    "cutoff_len": int,
    "train_on_prompt": bool,
    "mask_history": bool,
    "packing": bool,
    "neat_packing": bool,
    "enable_thinking": bool,
    "default_system": str,
    "max_bad_rows": float,
    "bf16": bool,
    "pure_bf16": bool,
    "infer_dtype": str,
    "quantization_bit": int,
    "disable_gradient_checkpointing": bool,
    "gradient_checkpointing": bool,
    "save_strategy": str,
    "save_steps": float,
    "save_total_limit": int,
    "logging_steps": float,
    "plot_loss": bool,
    "report_to": str,
    "logging_dir": str,
    "processes": int,
}
ALIASES = {"evaluation_strategy": "eval_strategy", "run_name": "name"}
# what changes nothing here, and why
PASSED_OVER = {
    "do_train": "training is what this command does",
    "template": "the tokenizer's own chat template is used, as when serving",
    "trust_remote_code": "code from a model's repository is never run",
    "use_fast_tokenizer": "tokenizers are always the fast ones",
    "cache_dir": "set HF_HOME instead",
    "flash_attn": "torch chooses the attention kernel",
    "use_reentrant_gc": "layers are computed again without re-entering autograd",
    "loraplus_lr_embedding": "embeddings are not adapted",
    "per_device_eval_batch_size": "validation rows are batched by length",
    "save_only_model": "checkpoints are always whole, so that a run can be taken up again",
    "overwrite_cache": "nothing is cached",
    "preprocessing_num_workers": "rows are read by one process",
    "preprocessing_batch_size": "rows are read by one process",
    "dataloader_num_workers": "rows are ready in memory",
    "tokenized_path": "nothing is cached",
    "ddp_timeout": "torch's own setting holds",
    "tf32": "torch's own setting holds",
    "include_num_input_tokens_seen": "tokens a second are always told",
    "compute_accuracy": "the loss is what is measured",
    "use_unsloth": "the experts of a run share one pass instead",
    "use_unsloth_gc": "gradient checkpointing is torch's",
    "enable_liger_kernel": "the output layer sees learned tokens alone, which saves the same",
    "hf_hub_token": "set HF_TOKEN instead",
    "ms_hub_token": "models come from one hub or a folder",
    "om_hub_token": "models come from one hub or a folder",
    "media_dir": "rows are text",
    "infer_backend": "loramix serves with its own engine",
    "export_size": "adapters are one file",
    "export_device": "nothing is exported",
    "export_legacy_format": "adapters are safetensors",
    "deepspeed": "every process holds the whole base",
    "fsdp": "every process holds the whole base",
}
# what is refused unless it has one of these values, and why
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "stage": (("sft",), "only supervised fine-tuning is supported"),
    "finetuning_type": (("lora",), "only LoRA experts can be mixed"),
    "do_eval": ((False, None), "use `loramix eval`"),
    "do_predict": ((False, None), "use `loramix ask`"),
    "adapter_name_or_path": ((None,), "experts begin anew"),
    "create_new_adapter": ((False, None), "experts begin anew"),
    "additional_target": ((None,), "whole layers cannot be mixed with other experts"),
    "resize_vocab": ((False, None), "an expert with tokens of its own cannot be mixed"),
    "add_tokens": ((None,), "an expert with tokens of its own cannot be mixed"),
    "add_special_tokens": ((None,), "an expert with tokens of its own cannot be mixed"),
    "new_special_tokens_config": ((None,), "an expert with tokens of its own cannot be mixed"),
    "quantization_method": (("bnb", "bitsandbytes", None), "4 bits are those of bitsandbytes"),
    "quantization_type": (("nf4", None), "4 bits are those of QLoRA, nf4"),
    "double_quantization": ((True, None), "4 bits are those of QLoRA, whose scales are rounded"),
    "rope_scaling": ((None,), "it would change the base"),
    "fp16": ((False, None), "its gradients vanish without care; use bf16 or float32"),
    "streaming": ((False, None), "rows are read whole, so that they can be checked"),
    "mix_strategy": (("concat", None), "datasets follow each other"),
    "interleave_probs": ((None,), "datasets follow each other"),
    "disable_shuffling": ((False, None), "rows are always shuffled"),
    "preserve_thinking": ((False, None), "the chat template decides what it keeps"),
    "metric_for_best_model": (("loss", "eval_loss", None), "the validation loss decides"),
    "greater_is_better": ((False, None), "the validation loss decides"),
    "lr_scheduler_kwargs": ((None, {}), "schedules have no options"),
    "resume_from_checkpoint": ((None, True, False), "the newest checkpoint in output_dir is taken"),
    "export_dir": ((None,), "this file merges; use `loramix merge`"),
    "use_galore": ((False, None), "experts are LoRA"),
    "use_apollo": ((False, None), "experts are LoRA"),
    "use_badam": ((False, None), "experts are LoRA"),
    "use_swanlab": ((False, None), "progress goes to trainer_log.jsonl"),
    "pissa_convert": ((True, False, None), ""),  # a PiSSA expert is always a plain LoRA when saved
    "pissa_iter": ((16, -1, None), "the singular vectors are exact"),
}
V1 = ("peft_config", "train_dataset", "micro_batch_size", "model")


def check_keys(values: Mapping[str, Any], *, inside: str = "") -> tuple[dict[str, Any], list[str]]:
    """The honoured keys with values of their type, and notes on those that were passed over.

    `inside` names the expert whose keys these are. Raises TrainError.
    """
    honoured, notes = {}, []
    known = OF_EXPERT if inside else {**OF_EXPERT, **OF_RUN}
    for given, value in values.items():
        key = ALIASES.get(str(given), str(given))
        if key in known:
            if value is not None:
                honoured[key] = _typed(key, value, known[key])
        elif key in PASSED_OVER and not inside:
            notes.append(f"{key} is passed over: {PASSED_OVER[key]}.")
        elif key in REFUSED and not inside:
            allowed, reason = REFUSED[key]
            if value not in allowed:
                raise TrainError(f"{key}: {value} is refused: {reason}.")
        else:
            raise _unknown(key, known, inside)
    return honoured, notes


def _unknown(key: str, known: Mapping[str, type], inside: str) -> TrainError:
    if key in V1:
        return TrainError(
            f"{key!r} is a key of LLaMA-Factory's new format (USE_V1); write the file with its "
            f"default keys, model_name_or_path, lora_rank, dataset and so on."
        )
    everything = known if inside else [*known, *PASSED_OVER, *REFUSED, *ALIASES, "experts"]
    close = difflib.get_close_matches(key, everything, n=1)
    place = f" of the expert {inside!r}" if inside else ""
    hint = f"Did you mean {close[0]!r}?" if close else "See docs/training.md for those there are."
    return TrainError(f"Unknown key {key!r}{place}. {hint}")


def _typed(key: str, value: Any, wanted: type) -> Any:
    """The value as its key's type; YAML reads 1e-4 as text."""
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if wanted is str and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if wanted in (int, float) and isinstance(value, (int, float, str)) and value is not True:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if number == number and (wanted is float or number == int(number)):
            return wanted(number)
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    raise TrainError(f"{key} is {value!r}; expected {names[wanted]}.")
