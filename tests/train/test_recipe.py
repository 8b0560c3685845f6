"""Training files of LLaMA-Factory mean here what they mean there, or say that they do not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loramix.errors import LoramixError, TrainError
from loramix.train.config import every_steps
from loramix.train.interleave import Mixing
from loramix.train.keys import PASSED_OVER, REFUSED
from loramix.train.plans import Export
from loramix.train.recipe import merging, plan, read_plan, read_values

GOLDEN = Path(__file__).parent / "golden"
LEAST = {"model_name_or_path": "pocket", "output_dir": "out/brand", "dataset": "identity"}

# What LLaMA-Factory's documentation lists for LoRA fine-tuning: none may be an unknown key.
TAKEN = """
model_name_or_path adapter_name_or_path create_new_adapter trust_remote_code model_revision
cache_dir stage do_train finetuning_type lora_rank lora_alpha lora_dropout lora_target
additional_target use_rslora use_dora pissa_init loraplus_lr_ratio loraplus_lr_embedding
quantization_bit quantization_method quantization_type double_quantization dataset eval_dataset
dataset_dir template cutoff_len train_on_prompt mask_history max_samples val_size packing
neat_packing mix_strategy interleave_probs enable_thinking preserve_thinking default_system
overwrite_cache preprocessing_num_workers dataloader_num_workers output_dir overwrite_output_dir
logging_steps save_strategy save_steps save_total_limit save_only_model plot_loss report_to
run_name resume_from_checkpoint per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type
lr_scheduler_kwargs warmup_ratio warmup_steps max_grad_norm weight_decay optim adam_beta1
adam_beta2 bf16 fp16 pure_bf16 tf32 seed eval_strategy evaluation_strategy eval_steps
load_best_model_at_end metric_for_best_model greater_is_better early_stopping_steps
compute_accuracy neftune_noise_alpha disable_gradient_checkpointing gradient_checkpointing
use_reentrant_gc flash_attn include_num_input_tokens_seen disable_shuffling export_dir
export_size export_device infer_backend infer_dtype ddp_timeout deepspeed fsdp use_unsloth
use_unsloth_gc enable_liger_kernel use_swanlab hf_hub_token ms_hub_token om_hub_token media_dir
export_legacy_format preprocessing_batch_size tokenized_path streaming new_special_tokens_config
resize_vocab use_galore use_apollo use_badam
"""


def test_llama_factorys_example_is_read_unchanged():
    found = read_plan(GOLDEN / "lora_sft.yaml")
    (expert,) = found.experts
    settings = expert.settings
    assert (found.base, found.dtype, found.overwrite) == (
        "Qwen/Qwen3-4B-Instruct-2507",
        "bfloat16",
        True,
    )
    assert expert.source.names == ("identity", "alpaca_en_demo")
    assert expert.source.folder == Path("data")
    assert (settings.rank, settings.scale, settings.targets) == (8, 2.0, ("all",))
    assert (settings.rate, settings.batch_size, settings.warmup) == (1e-4, 8, 0.1)
    assert (settings.schedule, settings.epochs, settings.max_length) == ("cosine", 3.0, 2048)
    assert (settings.seed, settings.keep_best, settings.max_norm) == (42, False, 1.0)
    assert found.run.micro_rows == 1
    assert found.run.checkpointing
    assert found.run.save_every == 500
    assert any("trust_remote_code is passed over" in note for note in found.notes)


def test_llama_factorys_qlora_example_is_read_unchanged():
    found = read_plan(GOLDEN / "qlora_sft.yaml")
    assert (found.quantize, found.dtype) == ("nf4", "bfloat16")


def test_llama_factorys_merging_example_is_read_unchanged():
    values = read_values(GOLDEN / "merge.yaml")
    assert merging(values) == Export(
        folder=Path("saves/qwen3_sft_merged"),
        base="Qwen/Qwen3-4B-Instruct-2507",
        shard_bytes=5 * 10**9,
        adapters=("saves/qwen3-4b/lora/sft",),
    )
    assert merging({**values, "dataset": "identity"}) is None
    with pytest.raises(TrainError, match="expected adapter_name_or_path beside it"):
        merging({**values, "adapter_name_or_path": None})
    with pytest.raises(TrainError, match="Unknown key 'export_dri'"):
        merging({**values, "export_dri": "x"})


def test_a_second_file_from_the_field_with_options_transformers_5_renamed():
    found = read_plan(GOLDEN / "brand_expert.yaml")
    (expert,) = found.experts
    settings = expert.settings
    assert expert.name == "brand-expert"
    assert settings.rate == 2e-4  # YAML 1.1 reads 2e-4 as text
    assert (settings.scale, settings.dropout, settings.batch_size) == (2.0, 0.05, 64)
    assert (expert.val_size, settings.validate_every) == (0.05, 20)
    assert found.run.save_every is None


def test_several_experts_share_what_is_above_them():
    found = read_plan(GOLDEN / "experts.yaml", ["experts.sounds.learning_rate=0.5", "seed=7"])
    colours, sounds = found.experts
    assert (colours.name, sounds.name) == ("colours", "sounds")
    assert (colours.settings.rank, sounds.settings.rank) == (4, 6)
    assert (colours.settings.rate, sounds.settings.rate) == (1e-2, 0.5)
    assert (colours.settings.seed, sounds.settings.seed) == (7, 7)
    assert sounds.settings.dora
    assert not colours.settings.dora


@pytest.mark.parametrize("key", TAKEN.split())
def test_no_key_of_the_list_is_unknown(key):
    try:
        said = str(plan({**LEAST, key: "1"}))
    except LoramixError as error:
        said = str(error)
    assert said
    assert "Unknown key" not in said


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"learnin_rate": 1}, "Unknown key 'learnin_rate'. Did you mean 'learning_rate'?"),
        ({"xyzzy": 1}, "Unknown key 'xyzzy'. See docs/training.md"),
        ({"peft_config": {}}, "USE_V1"),
        ({"stage": "dpo"}, "stage: dpo is refused: only supervised fine-tuning is supported"),
        ({"finetuning_type": "full"}, "only LoRA experts can be mixed"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 are both set; drop one of them"),
        ({"metric_for_best_model": "rouge"}, "expected loss, eval_loss, accuracy, eval_accuracy"),
        ({"greater_is_better": True}, "greater_is_better is True for the loss; drop that key"),
        ({"quantization_bit": 3}, "quantization_bit is 3; expected 8, 4"),
        ({"quantization_type": "fp4"}, "4 bits are those of QLoRA, nf4"),
        ({"double_quantization": False}, "whose scales are rounded"),
        ({"lora_rank": "eight"}, "lora_rank is 'eight'; expected a whole number"),
        ({"lora_rank": 8.5}, "expected a whole number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected a whole"),
        ({"lora_dropout": 1}, "lora_dropout is 1; expected a number, at least 0 and below 1"),
        ({"evaluation_strategy": "never"}, "evaluation_strategy is 'never'; expected no, steps"),
        ({"lora_rank": True}, "expected a whole number"),
        ({"learning_rate": "fast"}, "expected a number"),
        ({"streaming": True}, "streaming: rows without an end need max_steps, which brand lacks"),
        ({"interleave_probs": "a,b"}, "interleave_probs is 'a,b'; expected 0.7,0.3"),
        ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs is 'x'; expected {option: value"),
        ({"resume_from_checkpoint": "x", "save_strategy": False}, "drop save_strategy: no"),
        ({"resume_from_checkpoint": 4}, "is 4; expected true, false or a folder"),
        ({"packing": "yes"}, "packing is 'yes'; expected true or false"),
        ({"lora_rank": 0}, "lora_rank is 0; expected a whole number, at least 1"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; expected linear, cosine"),
        ({"optim": "paged_adamw_8bit"}, "optim is 'paged_adamw_8bit'"),
        ({"eval_strategy": "never"}, "eval_strategy is 'never'; expected no, steps, epoch"),
        ({"save_steps": 1.5}, "save_steps is 1.5; expected a number of steps, or a share of them"),
        ({"pissa_init": True, "olora_init": True}, "drop one of them"),
        (
            {"pissa_init": True, "use_dora": True},
            "use_dora and pissa_init are both set; drop one of them",
        ),
        ({"train_on_prompt": True, "mask_history": True}, "contradict each other"),
        ({"dataset": None}, "has no rows; expected the key dataset"),
        ({"output_dir": None}, "The key output_dir is missing"),
        ({"experts": {"a": {"lora_rnk": 1}}}, "Unknown key 'lora_rnk' of the expert 'a'"),
        ({"experts": {"a": {"packing": True}}}, "Unknown key 'packing' of the expert 'a'"),
        ({"experts": {"a": None}}, "The expert 'a' has no keys"),
        ({"experts": []}, "experts is no group of names"),
        ({"experts": {"a b": {"data": "x"}}}, "a b"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed, expected):
    with pytest.raises(LoramixError) as error:
        plan({**LEAST, **changed})
    assert expected in str(error.value)


def test_a_base_is_rounded_and_adam_remembers_in_eight_bits_where_that_is_asked():
    assert [plan({**LEAST, **keys}).quantize for keys in ({}, {"quantization_bit": 8})] == [
        "none",
        "int8",
    ]
    found = plan(
        {**LEAST, "quantization_bit": 4, "quantization_type": "nf4", "optim": "adamw_8bit"}
    )
    assert (found.quantize, found.experts[0].settings.optimizer) == ("nf4", "adamw8bit")


def test_what_the_order_and_the_rates_of_rows_hang_on_is_taken_over():
    found = plan(
        {
            **LEAST,
            "dataset": "a, b",
            "mix_strategy": "interleave_over",
            "interleave_probs": "0.7,0.3",
            "disable_shuffling": True,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
            "warmup_steps": 3,
            "preserve_thinking": False,
            "tf32": False,
        }
    )
    (expert,) = found.experts
    assert expert.source.mixing == Mixing("interleave_over", (0.7, 0.3), 42)
    assert not expert.settings.shuffled
    assert expert.settings.schedule_options == {"min_lr_rate": 0.1}
    assert (expert.settings.warmup, found.tf32) == (3, False)
    assert found.template == {"preserve_thinking": False}


def test_steps_below_one_are_a_share_of_all_of_them():
    keys = {"eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.5, "logging_steps": 0.1}
    found = plan({**LEAST, **keys})
    own = found.experts[0].settings.validate_every
    assert (own, found.run.save_every, found.log_every) == (0.25, 0.5, 0.1)
    assert [every_steps(each, 30) for each in (0.25, 0.5, 0.1, 1, 7)] == [8, 15, 3, 1, 7]


def test_a_constant_rate_is_warmed_up_only_if_its_name_says_so():
    warm = [
        plan({**LEAST, "lr_scheduler_type": name, "warmup_ratio": 0.1}).experts[0].settings.warmup
        for name in ("constant", "constant_with_warmup")
    ]
    assert warm == [0, 0.1]


@pytest.mark.parametrize(
    ("given", "resume", "place", "anew"),
    [
        (None, None, None, True),
        (True, True, None, False),
        (False, False, None, True),
        ("old/checkpoint-00000004", None, Path("old/checkpoint-00000004"), False),
    ],
)
def test_which_checkpoint_a_run_goes_on_from(given, resume, place, anew):
    found = plan({**LEAST, "overwrite_output_dir": True, "resume_from_checkpoint": given})
    assert (found.resume, found.run.resume_from, found.begins_anew) == (resume, place, anew)
    assert not plan(LEAST).begins_anew


def test_what_has_no_meaning_here_is_told():
    keys = ("swanlab_project", "image_max_pixels", "video_fps", "use_swanlab", "buffer_size")
    notes = plan({**LEAST, **dict.fromkeys(keys, 1)}).notes
    assert [note.split()[0] for note in notes] == list(keys)
    assert all("is passed over: " in note for note in notes)
    (note,) = plan({**LEAST, "streaming": True, "max_steps": 9}).notes
    assert "rows are read whole" in note


def test_precision_and_what_is_best():
    dtypes = [plan({**LEAST, key: True}).dtype for key in ("fp16", "bf16", "pure_bf16")]
    assert dtypes == ["float16", "bfloat16", "bfloat16"]
    found = plan({**LEAST, "metric_for_best_model": "eval_accuracy", "greater_is_better": True})
    assert found.experts[0].settings.best_by == "accuracy"


def test_every_refusal_and_note_has_a_reason():
    assert all(reason for reason in PASSED_OVER.values())
    assert all(reason for key, (_, reason) in REFUSED.items() if key != "pissa_convert")


def test_files_that_are_no_training_files(tmp_path):
    with pytest.raises(TrainError, match="does not exist"):
        read_plan(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1\nb")
    with pytest.raises(TrainError, match="is not YAML: "):
        read_plan(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(TrainError, match="holds no keys"):
        read_plan(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(TrainError, match="'rank' is no override"):
        read_plan(tmp_path / "a.yaml", ["rank"])


def test_a_gradient_that_is_not_to_be_clipped_is_not():
    assert plan({**LEAST, "max_grad_norm": 0}).experts[0].settings.max_norm == math.inf
