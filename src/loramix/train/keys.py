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
from loramix.train.interleave import MIXED
from loramix.train.kinds import Choice, Kind, Number, read
from loramix.train.schedule import OPTIONS

COUNT = Number(int, 1)
POSITIVE = Number(float, above=True)
AMOUNT = Number(float)
SHARE = Number(float, below=1)
STEPS = Number(int, -1)  # -1: as many as the epochs have
STRATEGIES: Choice = {"no": "no", "steps": "steps", "epoch": "epoch"}
SCHEDULES: Choice = {name: name for name in (*OPTIONS, "constant_with_warmup")}
OPTIMIZERS: Choice = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "sgd": "sgd",
}
MIXES: Choice = {name: name for name in MIXED}
REPORTS: Choice = {"none": "none", "tensorboard": "tensorboard"}
FSDP: Choice = {  # as transformers has them; in any case layer by layer
    "no": "no",
    "full_shard": "full",
    "full_shard auto_wrap": "full",
}
METRICS: Choice = {
    "loss": "loss",
    "eval_loss": "loss",
    "accuracy": "accuracy",
    "eval_accuracy": "accuracy",
}
DTYPES: Choice = {name: name for name in ("auto", "float32", "bfloat16", "float16")}
BITS: Choice = {8: "int8", 4: "nf4"}

# of one expert: each may also stand under `experts: {name: ...}`
OF_EXPERT: dict[str, Kind] = {
    "data": str,
    "eval_data": str,
    "dataset": str,
    "eval_dataset": str,
    "description": str,
    "preset": str,
    "adapter_name_or_path": str,
    "create_new_adapter": bool,
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "neftune_noise_alpha": AMOUNT,
    "lora_target": str,
    "use_rslora": bool,
    "use_dora": bool,
    "pissa_init": bool,
    "olora_init": bool,
    "loraplus_lr_ratio": POSITIVE,
    "mix_strategy": MIXES,
    "interleave_probs": str,
    "max_samples": COUNT,
    "val_size": AMOUNT,
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": STEPS,
    "lr_scheduler_type": SCHEDULES,
    "lr_scheduler_kwargs": dict,
    "warmup_ratio": AMOUNT,
    "warmup_steps": AMOUNT,
    "max_grad_norm": AMOUNT,
    "weight_decay": AMOUNT,
    "optim": OPTIMIZERS,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "disable_shuffling": bool,
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_strategy": STRATEGIES,
    "eval_steps": POSITIVE,
    "load_best_model_at_end": bool,
    "metric_for_best_model": METRICS,
    "greater_is_better": bool,
    "early_stopping_steps": COUNT,
    "seed": int,
}
# of the run as a whole
OF_RUN: dict[str, Kind] = {
    "model_name_or_path": str,
    "model_revision": str,
    "dataset_dir": str,
    "output_dir": str,
    "overwrite_output_dir": bool,
    "resume_from_checkpoint": bool | str,
    "library": str,
    "name": str,
    "fit_router": bool,
    "cutoff_len": COUNT,
    "train_on_prompt": bool,
    "mask_history": bool,
    "packing": bool,
    "neat_packing": bool,
    "enable_thinking": bool,
    "preserve_thinking": bool,
    "default_system": str,
    "max_bad_rows": AMOUNT,
    "bf16": bool,
    "pure_bf16": bool,
    "fp16": bool,
    "tf32": bool,
    "infer_dtype": DTYPES,
    "quantization_bit": BITS,
    "disable_gradient_checkpointing": bool,
    "gradient_checkpointing": bool,
    "save_strategy": STRATEGIES,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT,
    "logging_steps": POSITIVE,
    "plot_loss": bool,
    "report_to": REPORTS,
    "logging_dir": str,
    "streaming": bool,
    "export_dir": str,
    "export_size": POSITIVE,
    "fsdp": FSDP,
    "processes": COUNT,
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
    "include_num_input_tokens_seen": "tokens a second are always told",
    "compute_accuracy": "accuracy is told with every validation",
    "use_unsloth": "the experts of a run share one pass instead",
    "use_swanlab": "progress goes to trainer_log.jsonl, or to report_to: tensorboard",
    "buffer_size": "rows are read whole and shuffled all together",
    "use_unsloth_gc": "gradient checkpointing is torch's",
    "enable_liger_kernel": "the output layer sees learned tokens alone, which saves the same",
    "hf_hub_token": "set HF_TOKEN instead",
    "ms_hub_token": "models come from one hub or a folder",
    "om_hub_token": "models come from one hub or a folder",
    "media_dir": "rows are text",
    "infer_backend": "loramix serves with its own engine",
    "export_device": "tensors are merged on the CPU, a few at a time",
    "export_legacy_format": "models are safetensors",
    "deepspeed": "a base is spread over processes by fsdp",
    "fsdp_config": "layers are spread one by one",
}
# and keys that begin so
PREFIXES = {
    "swanlab_": "progress goes to trainer_log.jsonl, or to report_to: tensorboard",
    "image_": "rows are text",
    "video_": "rows are text",
    "audio_": "rows are text",
}
# what is refused unless it has one of these values, and why
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "stage": (("sft",), "only supervised fine-tuning is supported"),
    "finetuning_type": (("lora",), "only LoRA experts can be mixed"),
    "do_eval": ((False, None), "use `loramix eval`"),
    "do_predict": ((False, None), "use `loramix ask`"),
    "additional_target": (
        (None, [], ""),
        "layers that are learned whole are no low-rank updates, and cannot be mixed or swapped; "
        "name linear layers in lora_target",
    ),
    "resize_vocab": ((False, None), "an expert with tokens of its own cannot be mixed"),
    "add_tokens": ((None,), "an expert with tokens of its own cannot be mixed"),
    "add_special_tokens": ((None,), "an expert with tokens of its own cannot be mixed"),
    "new_special_tokens_config": ((None,), "an expert with tokens of its own cannot be mixed"),
    "quantization_method": (("bnb", "bitsandbytes", None), "4 bits are those of bitsandbytes"),
    "quantization_type": (("nf4", None), "4 bits are those of QLoRA, nf4"),
    "double_quantization": ((True, None), "4 bits are those of QLoRA, whose scales are rounded"),
    "rope_scaling": ((None,), "it would change the base"),
    "use_galore": ((False, None), "experts are LoRA"),
    "use_apollo": ((False, None), "experts are LoRA"),
    "use_badam": ((False, None), "experts are LoRA"),
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
        reason = None if inside else _passed_over(key)
        if key in known:
            if value is not None:
                honoured[key] = read(str(given), value, known[key])
        elif reason:
            notes.append(f"{key} is passed over: {reason}.")
        elif key in REFUSED and not inside:
            allowed, reason = REFUSED[key]
            if value not in allowed:
                raise TrainError(f"{key}: {value} is refused: {reason}.")
        else:
            raise _unknown(key, known, inside)
    return honoured, notes


def _passed_over(key: str) -> str | None:
    begins = (reason for prefix, reason in PREFIXES.items() if key.startswith(prefix))
    return PASSED_OVER.get(key) or next(begins, None)


def _unknown(key: str, known: Mapping[str, Kind], inside: str) -> TrainError:
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
