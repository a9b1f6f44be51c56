"""Which parameters share a rate and a decay."""

import pytest
import torch
from torch import nn

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from tests.helpers.models import CONFIGS
from trainer.optim.config import AdamwConfig, GroupRule
from trainer.optim.groups import group_parameters, layer_factors

NAMES = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.q_proj.weight": (4, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.q_proj.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}


def by_name(config, names=NAMES, model_names=()):
    """{name: (rate, decay)}."""
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in names.items()]
    groups = group_parameters(config, named, model_names)
    return {name: (g.lr, g.weight_decay) for g in groups for name in g.names}


def test_matrices_decay_and_vectors_do_not():
    found = by_name(AdamwConfig(lr=1.0, weight_decay=0.1))
    assert {name: decay for name, (_, decay) in found.items()} == {
        name: 0.1 if len(shape) == 2 else 0.0 for name, shape in NAMES.items()
    }
    assert {rate for rate, _ in found.values()} == {1.0}


def test_optimizer_group_of_a_partitioned_parameter_is_by_its_full_shape():
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_shape = torch.Size([4, 4])
    (group,) = group_parameters(AdamwConfig(lr=1.0, weight_decay=0.1), [("layers.0.q.weight", parameter)], ())
    assert group.weight_decay == 0.1 and group.are_block_matrices


def test_optimizer_layer_decay_counts_down_from_the_head():
    rates = {name: rate for name, (rate, _) in by_name(AdamwConfig(lr=1.0, layer_decay=0.5)).items()}
    assert rates == {
        "model.embed_tokens.weight": 0.125,
        "model.layers.0.q_proj.weight": 0.25,
        "model.layers.0.norm.weight": 0.25,
        "model.layers.1.q_proj.weight": 0.5,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }


def test_optimizer_layer_decay_counts_frozen_layers():
    trained = {"base_model.model.model.layers.0.q_proj.lora_A.default.weight": (4, 4)}
    model = [*trained, "base_model.model.model.layers.3.q_proj.base_layer.weight"]
    assert by_name(AdamwConfig(lr=1.0, layer_decay=0.5), trained, model) == {next(iter(trained)): (0.5**4, 0.0)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "falcon", "distilbert"])
def test_optimizer_layer_decay_knows_the_layers_of_every_architecture(architecture):
    import transformers

    name, extra = CONFIGS[architecture]
    with meta_context():
        auto = transformers.AutoModelForMaskedLM if architecture == "distilbert" else transformers.AutoModelForCausalLM
        model = auto.from_config(getattr(transformers, name)(vocab_size=64, **extra))
    names = [name for name, _ in model.named_parameters()]
    factors = layer_factors(names, names, 0.5)
    layers = model.config.num_hidden_layers
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert factors[embedding] == 0.5 ** (layers + 1)
    assert {factors[n] for n in names} == {0.5**k for k in range(layers + 2)}
    head = model.get_output_embeddings().weight
    for n, p in model.named_parameters():
        if p is head and head is not model.get_input_embeddings().weight:
            assert factors[n] == 1.0


def test_a_model_without_numbered_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.layer_decay=0\.9: .*set optim\.layer_decay=1"):
        by_name(AdamwConfig(lr=1.0, layer_decay=0.9), {"encoder.weight": (2, 2)})


def test_rules_multiply_rates_and_replace_decay():
    rules = {
        "head": GroupRule(match="lm_head", lr_factor=10.0, weight_decay=0.0),
        "norms": GroupRule(match=r"norm\.weight$", weight_decay=0.3),
    }
    found = by_name(AdamwConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5, groups=rules))
    assert found["lm_head.weight"] == (10.0, 0.0)
    assert found["model.layers.0.norm.weight"] == (0.25, 0.3)
    assert found["model.norm.weight"] == (1.0, 0.3)
    assert found["model.layers.0.q_proj.weight"] == (0.25, 0.1)


def test_optimizer_group_rule_that_matches_nothing_lists_what_exists():
    with pytest.raises(ConfigError, match=r"optim\.groups\.x\.match=score: matches none of the 6 .*lm_head\.weight"):
        by_name(AdamwConfig(lr=1.0, groups={"x": GroupRule(match="score")}))


def test_optimizer_group_rules_that_match_the_same_parameter_are_refused():
    rules = {"a": GroupRule(match="lm_head"), "b": GroupRule(match="head")}
    with pytest.raises(
        ConfigError, match=r"optim\.groups\.b\.match=head: lm_head\.weight is matched by optim\.groups\.a"
    ):
        by_name(AdamwConfig(lr=1.0, groups=rules))
