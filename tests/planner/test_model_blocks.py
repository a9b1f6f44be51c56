"""How a model's blocks repeat, by what transformers builds, and the same model of fewer."""

from dataclasses import replace

import pytest
import transformers

from trainer.model.config import ModelConfig
from trainer.planner.model_blocks import BlockPattern, block_pattern, repeating_pattern, truncated_model


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("aaaa", BlockPattern(4, 1)),
        ("abab", BlockPattern(4, 2)),
        ("aabaabaa", BlockPattern(8, 3)),
        ("xaaaa", BlockPattern(5, 1, 1)),
        ("xyabababa", BlockPattern(9, 2, 2)),
        ("abcd", BlockPattern(4, None)),
        ("a", BlockPattern(1, None)),
    ],
)
def test_model_blocks_pattern_has_the_fewest_blocks_before_those_that_repeat(kinds, found):
    assert repeating_pattern(kinds) == found


WINDOWED = ["sliding_attention"] * 5 + ["full_attention"]
SOME = {
    "sliding": (transformers.Gemma3TextConfig, {"layer_types": WINDOWED * 3}, BlockPattern(18, 6)),
    "leading": (transformers.Glm4MoeConfig, {"first_k_dense_replace": 1}, BlockPattern(18, 1, 1)),
    "every second": (transformers.Qwen2MoeConfig, {"decoder_sparse_step": 2, "num_experts": 4}, BlockPattern(18, 2)),
    "named": (transformers.Qwen3MoeConfig, {"mlp_only_layers": [0, 1], "num_experts": 4}, BlockPattern(18, 1, 2)),
    "hybrid": (transformers.BambaConfig, {"attn_layer_indices": [3, 7, 11, 15]}, BlockPattern(18, 4)),
}


@pytest.mark.parametrize("name", SOME)
def test_model_blocks_are_told_apart_by_what_is_built(tmp_path, name):
    made, settings, found = SOME[name]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    made(**sizes, **settings, num_hidden_layers=18, vocab_size=128).save_pretrained(tmp_path / "all")
    of = ModelConfig(path=str(tmp_path / "all"))
    assert block_pattern(of) == found
    assert block_pattern(truncated_model(of, 18 - found.period, tmp_path / "few")) == replace(
        found, num_blocks=18 - found.period
    )
