"""What is read of an architecture before it is trained."""

import pytest
import transformers

from strategies.errors import ConfigError
from tests.models import tiny
from trainer.model.architecture import build_plain_model, width_and_num_blocks
from trainer.model.config import ModelConfig, ModelKind


def test_architecture_width_and_blocks_are_known_also_without_a_setting():
    blt = tiny.tiny_model("blt")  # whose four parts have sizes of their own
    assert not hasattr(blt.config, "hidden_size")
    layers = sum(name.rpartition(".")[0].endswith("layers") for name, _ in blt.named_modules())
    assert width_and_num_blocks(blt) == (blt.config.global_config.hidden_size, layers)
    llama = tiny.tiny_model("llama")
    assert width_and_num_blocks(llama) == (llama.config.hidden_size, llama.config.num_hidden_layers)


def test_architecture_that_cannot_be_built_leaves_the_dropout_of_its_configuration_as_it_was():
    config = tiny.tiny_config("llama")
    config.attention_dropout, config.hidden_act = 0.25, "no such activation"
    with pytest.raises(ConfigError, match="cannot be built"):
        build_plain_model(ModelKind.causal, config, ModelConfig(path="it", dropout=0.5), "eager", "sft")
    assert config.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("model_type", "kind", "words"),
    [
        ("qwen3_vl_text", ModelKind.causal, r"a part of qwen3_vl: give the whole model"),
        ("modernbert", ModelKind.causal, r"an encoder, which objective=classification trains"),
        ("clip_text_model", ModelKind.causal, r"take a model of another architecture \(docs/models.md"),
        ("mllama_text_model", ModelKind.classifier, r"for objective=classification of a mllama_text_model .*another"),
    ],
)
def test_architecture_that_has_no_class_is_refused_with_what_does_work(model_type, kind, words):
    objective = "classification" if kind is ModelKind.classifier else "sft"
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(ConfigError, match=words):
        build_plain_model(kind, config, ModelConfig(path="it"), "eager", objective)
