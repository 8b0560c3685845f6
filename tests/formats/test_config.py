import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loramix.errors import FormatError
from loramix.formats.config import EXTRAS, HARMLESS, HONOURED, REFUSED, Settings, interpret
from tests.formats.layouts import CONFIG

LAYERS = [
    f"{stem}.{number}.{leaf}"
    for stem in ("model.layers", "transformer.h", "model.language_model.layers")
    for number in (0, 1, 11)
    for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.3.up_proj", "attn.c_attn")
]
TARGETS = ["q_proj", "up_proj", "attn.c_attn", "model.layers.1.self_attn.q_proj", "proj"]
REGEXES = [r".*\.(q|k)_proj", r".*\.1\..*", "q_proj", r"model\.layers\.\d+\.mlp\.up_proj"]

names = st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True)
config = st.fixed_dictionaries(
    {"target_modules": names},
    optional={
        "exclude_modules": st.one_of(names, st.sampled_from(REGEXES)),
        "layers_to_transform": st.one_of(st.integers(0, 2), st.lists(st.integers(0, 11))),
        "layers_pattern": st.one_of(st.just([]), st.sampled_from(["layers", "h", ["h", "layers"]])),
    },
)
regexes = st.fixed_dictionaries({"target_modules": st.sampled_from(REGEXES)})


@example({"target_modules": [TARGETS[3]], "layers_to_transform": 0}, TARGETS[3])
@settings(max_examples=200, deadline=None)
@given(st.one_of(config, regexes), st.sampled_from(LAYERS))
def test_a_layer_is_targeted_exactly_if_peft_would_adapt_it(fields, layer):
    if fields.get("layers_pattern") and "layers_to_transform" not in fields:
        fields = fields | {"layers_to_transform": [0]}
    theirs = LoraConfig(**fields)
    theirs.target_modules = fields["target_modules"]
    found = check_target_module_exists(theirs, layer)
    assert interpret(CONFIG | fields, "x").targeted(layer) == bool(found)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*TARGETS, *REGEXES, "^model.layers.0"]), st.integers(1, 9)),
    st.sampled_from(LAYERS),
    st.booleans(),
)
def test_patterns_give_pefts_scale(patterns, layer, rslora):
    fields = {"rank_pattern": patterns, "alpha_pattern": patterns, "use_rslora": rslora}
    key = get_pattern_key(patterns.keys(), layer)
    rank, alpha = patterns.get(key, CONFIG["r"]), patterns.get(key, CONFIG["lora_alpha"])
    expected = alpha / (rank**0.5 if rslora else rank)
    assert interpret(CONFIG | fields, "x").scale(layer, rank, "x") == pytest.approx(expected)


def test_every_field_of_pefts_config_is_known():
    """A new field of a newer PEFT fails here, and in `interpret`, until somebody understands it."""
    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs <= HONOURED | HARMLESS | EXTRAS.keys() | REFUSED.keys()


def test_the_groups_of_fields_do_not_overlap():
    groups = [HONOURED, HARMLESS, EXTRAS.keys(), REFUSED.keys()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_a_default_config_of_peft_is_read():
    fields = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    fields = {key: getattr(value, "value", value) for key, value in fields.items()}
    fields["target_modules"] = [*fields["target_modules"]]
    found = interpret(fields, "x")
    assert (found.rank, found.alpha, found.targets) == (8, 8.0, ("q_proj",))


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_is_no_matter(value):
    assert interpret(CONFIG | {"use_tomorrow": value}, "x").rank == 2


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_any_layer_may_be_adapted(targets):
    found = interpret(CONFIG | {"target_modules": targets}, "x")
    found.check_layers(["anything.at.all"], "x")


def test_a_target_that_is_excluded_needs_no_update():
    found = interpret(CONFIG | {"target_modules": ["a", "b"], "exclude_modules": ["b"]}, "x")
    found.check_layers(["model.a"], "x")
    with pytest.raises(FormatError, match="targets b"):
        interpret(CONFIG | {"target_modules": ["a", "b"]}, "x").check_layers(["model.a"], "x")


@pytest.mark.parametrize(
    ("written", "base"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/home/me/models/llama-7b/", "llama-7b"),
        ("./models/llama", "llama"),
        ("C:\\models\\llama", "llama"),
        ("~/llama", "llama"),
        (None, ""),
    ],
)
def test_the_base_is_a_hub_id_or_a_name_but_no_path(written, base):
    assert interpret(CONFIG | {"base_model_name_or_path": written}, "x").base == base


def test_without_a_config_nothing_is_scaled():
    assert Settings().scale("model.q_proj", 4, "x") == 1.0


def test_lora_only_accepts_a_config_that_trained_more():
    extras = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [1]}
    assert interpret(CONFIG | extras, "x", lora_only=True).rank == 2


def test_mlx_alpha_counts_only_where_it_is_sure_to_mean_nothing():
    inner = {"rank": 8, "alpha": 16, "scale": 10.0}
    for more in ({}, {"num_layers": 4}, {"lora_layers": -1}):
        assert interpret({"lora_parameters": inner} | more, "x").factor == 10.0
    assert (
        interpret({"lora_parameters": inner | {"alpha": 8}, "lora_layers": 4}, "x").factor == 10.0
    )
    with pytest.raises(FormatError, match="set the scale and delete alpha"):
        interpret({"lora_parameters": inner, "lora_layers": 4}, "x")


@pytest.mark.parametrize("pattern", ["(layers|h)", "layers|h"])
def test_a_pattern_of_layers_may_have_groups_and_choices(pattern):
    fields = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": pattern}
    settings = interpret(CONFIG | fields, "x")
    assert settings.targeted("model.layers.1.q")
    assert settings.targeted("model.h.1.q")
    assert not settings.targeted("model.layers.0.q")
