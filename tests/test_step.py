"""Which blocks are sharded one at a time."""

import torch
import transformers

from strategies.parameters import meta_context
from trainer.step import TrainStep

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def units(config):
    with meta_context():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    step = TrainStep(model, torch.nn.Identity(), set(model._no_split_modules))  # type: ignore[arg-type]
    return [type(block).__name__ for block in step.shard_units()]


def test_sharded_units_leave_out_a_block_that_shares_its_parameters():
    """BERT's embeddings are a block of their own by its list, and the head's matrix too."""
    assert units(transformers.BertConfig(**SIZES, is_decoder=True)) == ["BertLayer", "BertLayer"]


def test_sharded_units_are_all_ordinary_blocks():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    assert units(config) == ["LlamaDecoderLayer"] * 2
