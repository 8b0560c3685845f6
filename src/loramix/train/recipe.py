"""A training file as a plan: which experts, from which rows, learned how.

    model_name_or_path: pocket
    output_dir: build/experts
    learning_rate: 1.0e-3                      # for all of them
    experts:
      support: {data: support.jsonl}
      math: {data: math.jsonl, lora_rank: 32}  # and each its own

Without `experts` the file is LLaMA-Factory's, and trains one. Paths are taken from where the
command runs, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramix.errors import TrainError
from loramix.mix import check_name, slug
from loramix.train.config import Run, Settings
from loramix.train.data import Learned
from loramix.train.dataset import MAX_BAD
from loramix.train.interleave import Mixing
from loramix.train.keys import check_keys
from loramix.train.online import is_hub_source
from loramix.train.plans import ExpertPlan, Export, Plan, Source
from loramix.train.presets import told, with_preset


def read_plan(file: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file, with `key=value` overrides. Raises TrainError."""
    return plan(read_values(file, overrides))


def read_values(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a YAML file, with `key=value` overrides. Raises TrainError."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainError(f"{file} does not exist; expected a training file in YAML.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainError(f"{file} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise TrainError(f"{file} holds no keys; expected model_name_or_path, dataset and so on.")
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise TrainError(f"{word!r} is no override; expected key=value.")
        _set(values, key, yaml.safe_load(text))
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """experts.math.lora_rank=8 reaches inside."""
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise TrainError(f"{key} names nothing that can be set: {part} is no group of keys.")
    values[last] = value


def merging(values: Mapping[str, Any]) -> Export | None:
    """What a file asks for that merges and trains nothing; None for one that trains."""
    if "export_dir" not in values or {"dataset", "data", "experts"} & values.keys():
        return None
    found = _export(check_keys(values)[0])
    if found is None or not found.adapters:
        raise TrainError("export_dir without rows merges; expected adapter_name_or_path beside it.")
    return found


def plan(values: Mapping[str, Any]) -> Plan:
    """The plan of a training file's keys. Raises TrainError."""
    named = values.get("experts")
    common, notes = check_keys({k: v for k, v in values.items() if k != "experts"})
    for key in ("model_name_or_path", "output_dir"):
        if key not in common:
            raise TrainError(f"The key {key} is missing; expected it in every training file.")
    output = Path(common["output_dir"])
    if named is None:
        given = {common.get("name") or slug(output.name) or "expert": common}
    elif not isinstance(named, dict) or not named:
        raise TrainError("experts is no group of names; expected {name: {data: ...}, ...}.")
    else:
        given = {str(name): {**common, **_own(name, own)} for name, own in named.items()}
    experts = [_expert(check_name(name), with_preset(keys)) for name, keys in given.items()]
    notes += [line for name, keys in given.items() for line in told(name, keys)]
    board = _board(common, output)
    if board is None and "logging_dir" in common:
        notes.append("logging_dir is passed over: report_to does not name tensorboard.")
    if common.get("streaming"):
        notes.append(_streamed(experts))
    resume = common.get("resume_from_checkpoint")
    return Plan(
        base=common["model_name_or_path"],
        experts=tuple(experts),
        output=output,
        run=_run(common, output, len(experts)),
        library=Path(common["library"]) if "library" in common else None,
        revision=common.get("model_revision"),
        dtype=_dtype(common),
        quantize=common.get("quantization_bit", "none"),
        overwrite=common.get("overwrite_output_dir", False),
        resume=resume if isinstance(resume, bool) else None,
        fit_router=common.get("fit_router", True),
        learned=_learned(common),
        template=_template(common),
        system=common.get("default_system", ""),
        max_bad=common.get("max_bad_rows", MAX_BAD),
        log_every=_steps("logging_steps", common.get("logging_steps", 10)),
        plot=common.get("plot_loss", False),
        export=_export(common),
        board=board,
        tf32=common.get("tf32"),
        processes=common.get("processes", 1),
        notes=tuple(notes),
    )


def _streamed(experts: Sequence[ExpertPlan]) -> str:
    """What is said of rows that are to be streamed. TrainError if nothing says when to end."""
    if endless := [expert.name for expert in experts if expert.settings.max_steps is None]:
        raise TrainError(
            f"streaming: rows without an end need max_steps, which {', '.join(endless)} lacks."
        )
    return "streaming is passed over: rows are read whole, so that they can be checked."


def _own(name: Any, own: Any) -> dict[str, Any]:
    """The keys below an expert's name."""
    if not isinstance(own, dict):
        raise TrainError(f"The expert {name!r} has no keys; expected {{data: rows.jsonl, ...}}.")
    return check_keys(own, inside=str(name))[0]


def _expert(name: str, values: Mapping[str, Any]) -> ExpertPlan:
    source = _source(values, "data", "dataset")
    if source is None:
        raise TrainError(f"{name!r} has no rows; expected the key dataset, or data with a file.")
    return ExpertPlan(
        name=name,
        source=source,
        settings=_settings(values),
        validation=_source(values, "eval_data", "eval_dataset"),
        val_size=values.get("val_size", 0.0),
        max_samples=values.get("max_samples"),
        description=values.get("description", ""),
        begins=_listed(values.get("adapter_name_or_path", "")),
        anew=values.get("create_new_adapter", False),
    )


def _source(values: Mapping[str, Any], file: str, names: str) -> Source | None:
    if file in values:
        given = values[file]
        return Source(hub=given) if is_hub_source(given) else Source(file=Path(given))
    if names not in values:
        return None
    folder = Path(values.get("dataset_dir", "data"))
    return Source(names=_listed(values[names]), folder=folder, mixing=_mixing(values))


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _mixing(values: Mapping[str, Any]) -> Mixing:
    given = values.get("interleave_probs")
    try:
        shares = tuple(float(part) for part in given.split(",")) if given else ()
    except ValueError as error:
        raise TrainError(f"interleave_probs is {given!r}; expected 0.7,0.3 or the like.") from error
    return Mixing(values.get("mix_strategy", "concat"), shares, values.get("seed", 42))


def _settings(values: Mapping[str, Any]) -> Settings:
    get = values.get
    rank = get("lora_rank", 8)
    schedule = get("lr_scheduler_type", "linear")
    warmup = get("warmup_steps", 0.0) or get("warmup_ratio", 0.0)
    steps = get("max_steps", -1)
    return Settings(
        rank=rank,
        alpha=get("lora_alpha"),
        rslora=get("use_rslora", False),
        dora=get("use_dora", False),
        targets=_listed(get("lora_target", "all")),
        start=_start(values),
        rate=get("learning_rate", 5e-5),
        b_ratio=get("loraplus_lr_ratio", 1.0),
        schedule="constant" if schedule == "constant_with_warmup" else schedule,
        schedule_options=get("lr_scheduler_kwargs", {}),
        warmup=0.0 if schedule == "constant" else warmup,
        epochs=get("num_train_epochs", 3.0),
        max_steps=steps if steps > 0 else None,
        batch_size=get("per_device_train_batch_size", 8) * get("gradient_accumulation_steps", 1),
        shuffled=not get("disable_shuffling", False),
        optimizer=get("optim", "adamw"),
        betas=(get("adam_beta1", 0.9), get("adam_beta2", 0.999)),
        weight_decay=get("weight_decay", 0.0),
        max_norm=get("max_grad_norm", 1.0) or math.inf,
        dropout=get("lora_dropout", 0.0),
        noise=get("neftune_noise_alpha", 0.0),
        validate_every=_every(values),
        patience=get("early_stopping_steps"),
        keep_best=get("load_best_model_at_end", False),
        best_by=_best_by(values),
        max_length=get("cutoff_len", 2048),
        seed=get("seed", 42),
    )


def _start(values: Mapping[str, Any]) -> str:
    if values.get("pissa_init") and values.get("olora_init"):
        raise TrainError("pissa_init and olora_init are both set; drop one of them.")
    start = next((s for s in ("pissa", "olora") if values.get(f"{s}_init")), "default")
    if values.get("use_dora") and start != "default":
        raise TrainError(f"use_dora and {start}_init are both set; drop one of them.")
    return start


def _best_by(values: Mapping[str, Any]) -> str:
    metric = str(values.get("metric_for_best_model", "loss"))
    greater = values.get("greater_is_better", metric == "accuracy")
    if greater != (metric == "accuracy"):
        raise TrainError(f"greater_is_better is {greater} for the {metric}; drop that key.")
    return metric


def _every(values: Mapping[str, Any]) -> float | None:
    if values.get("eval_strategy") != "steps":
        return None
    steps = values.get("eval_steps", values.get("logging_steps", 500))
    return _steps("eval_steps", steps)


def _run(values: Mapping[str, Any], output: Path, num_experts: int) -> Run:
    strategy = values.get("save_strategy", "steps")
    resume = values.get("resume_from_checkpoint")
    if resume and strategy == "no":
        raise TrainError("resume_from_checkpoint needs checkpoints; drop save_strategy: no.")
    every = _steps("save_steps", values.get("save_steps", 500)) if strategy == "steps" else None
    recompute = values.get("gradient_checkpointing")
    if recompute is None:  # computed again by default, as in LLaMA-Factory
        recompute = not values.get("disable_gradient_checkpointing", False)
    return Run(
        micro_rows=values.get("per_device_train_batch_size", 8),
        checkpointing=recompute,
        packing=values.get("packing", False) or values.get("neat_packing", False),
        folder=None if strategy == "no" else output,
        resume_from=Path(resume) if isinstance(resume, str) else None,
        save_every=every,
        sharded=values.get("fsdp") == "full",
        keep=values.get("save_total_limit", 2),
    )


def _dtype(values: Mapping[str, Any]) -> str:
    halves = [key for key in ("bf16", "pure_bf16", "fp16") if values.get(key)]
    if "fp16" in halves and len(halves) > 1:
        raise TrainError(f"{halves[0]} and fp16 are both set; drop one of them.")
    if halves:
        return "float16" if halves == ["fp16"] else "bfloat16"
    return str(values.get("infer_dtype", "auto"))


def _learned(values: Mapping[str, Any]) -> Learned:
    if values.get("train_on_prompt"):
        if values.get("mask_history"):
            raise TrainError("train_on_prompt and mask_history contradict each other; drop one.")
        return "all"
    return "last answer" if values.get("mask_history") else "answers"


def _template(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: values[k] for k in ("enable_thinking", "preserve_thinking") if k in values}


def _export(values: Mapping[str, Any]) -> Export | None:
    if "export_dir" not in values:
        return None
    if "model_name_or_path" not in values:
        raise TrainError("The key model_name_or_path is missing; expected it beside export_dir.")
    size = values.get("export_size")
    return Export(
        folder=Path(values["export_dir"]),
        base=values["model_name_or_path"],
        revision=values.get("model_revision"),
        shard_bytes=None if size is None else round(size * 1e9),
        overwrite=values.get("overwrite_output_dir", False),
        adapters=_listed(values.get("adapter_name_or_path", "")),
    )


def _board(values: Mapping[str, Any], output: Path) -> Path | None:
    asked = values.get("report_to") == "tensorboard"
    return Path(values.get("logging_dir", output / "runs")) if asked else None


def _steps(key: str, value: float) -> float:
    if value > 1 and value != int(value):
        raise TrainError(f"{key} is {value:g}; expected a number of steps, or a share of them.")
    return value
