"""Linear layers that an adapter must leave alone."""

import re

import pytest
import transformers

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from trainer.model.architecture import modules_beside_text, transformers_class
from trainer.model.config import ModelKind
from trainer.tuning.adapter import Adapter
from trainer.tuning.base import LoraConfig
from trainer.tuning.config import Ia3Config, LnConfig

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
JAMBA = transformers.JambaConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1
)
MAMBA = transformers.MambaConfig(**SIZES, state_size=8)
GEMMA = transformers.Gemma3Config(
    text_config={**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
    vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
)


def adapted(config):
    """Names of the layers that LoRA on every linear layer adapts."""
    with meta_context():
        model = transformers_class(ModelKind.causal, config).from_config(config)
    model.modules_beside_text = modules_beside_text(model)
    tuned = Adapter(LoraConfig(rank=2)).apply(model)
    return {
        re.sub(r"^.*?layers\.", "", name.split(".lora_A")[0])
        for name, p in tuned.named_parameters()
        if ".lora_A." in name
    }


@pytest.mark.parametrize(
    ("config", "kept"), [(MAMBA, {"0.mixer.in_proj", "1.mixer.in_proj"}), (JAMBA, {"0.mamba.in_proj"})]
)
def test_adapter_targets_of_a_state_space_mixer_are_its_input_projection(config, kept):
    assert {name for name in adapted(config) if ".mamba." in name or ".mixer." in name} == kept


def test_adapter_targets_leave_out_towers_beside_the_text_model():
    names = adapted(GEMMA)
    assert "1.self_attn.q_proj" in names
    assert not any("vision" in name or "projector" in name for name in names)


@pytest.mark.parametrize("config", [Ia3Config(), LnConfig()], ids=lambda config: config.name)
def test_where_peft_knows_no_targets_an_error_names_those_of_the_model(config):
    with meta_context():
        model = transformers_class(ModelKind.causal, MAMBA).from_config(MAMBA)
    with pytest.raises(ConfigError, match=r"targets=auto: it knows none .*; set some of: .*in_proj.* norm, .*x_proj"):
        Adapter(config).apply(model)


def note_of(**settings):
    """What LoRA tells of its targets on a Llama whose blocks have four square matrices, and three that are 1.5 times as large."""
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, intermediate_size=48)
    with meta_context():
        model = transformers_class(ModelKind.causal, config).from_config(config)
    adapter = Adapter(LoraConfig(rank=2, **settings))
    adapter.apply(model)
    return adapter.note


def test_adapter_targets_that_reach_few_weights_are_told_with_the_names_that_reach_more():
    # Of 4 + 3 * 1.5 = 8.5 squares in a block, q_proj and v_proj are two: 24 %.
    for targets in (["q_proj", "v_proj"], r".*\.(q|v)_proj"):
        note = note_of(targets=targets)
        assert "reaches 24% of the weights of linear layers" in note
        assert "down_proj 18%, gate_proj 18%, up_proj 18%, k_proj 12%, o_proj 12%" in note
        assert "all-linear reaches 100%" in note


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], "all-linear"])
def test_adapter_targets_that_reach_many_weights_need_no_word(targets):
    assert note_of(targets=targets) == ""
