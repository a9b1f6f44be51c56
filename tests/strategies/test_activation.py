"""Recomputed blocks through the model's own interface."""

import warnings

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.activation import apply_to_blocks
from strategies.base import ActivationCheckpointing, SingleConfig
from tests.helpers.models import tiny_model_dir
from trainer.objectives.sft import Sft
from trainer.step import TrainStep


@pytest.mark.parametrize("mode", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
def test_nothing_that_transformers_has_deprecated_is_called(mode, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_dir(tmp_path, "llama"))
    step = TrainStep(AutoModelForCausalLM.from_config(config), Sft(), {"LlamaDecoderLayer"})
    blocks = step.shard_units()
    assert blocks and not any(block.gradient_checkpointing for block in blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_to_blocks(step, SingleConfig(activation_checkpointing=mode))
    assert all(block.gradient_checkpointing for block in blocks)
    kept = {"context_fn" in block._gradient_checkpointing_func.keywords for block in blocks}
    assert kept == {mode is ActivationCheckpointing.selective}
