"""Tiles of the MLP: which models may have them, and what is said of the others."""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaMLP

from strategies.base import StepPlan
from strategies.errors import ConfigError
from tests.helpers.models import CONFIGS, tiny_model_dir
from trainer.model import tiles
from trainer.model.config import ModelKind
from trainer.model.tiles import tile_mlps

MIXTURES = ("qwen3_moe", "gpt_oss", "mixtral")
REFUSED = (*MIXTURES, "distilbert")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test proves anew."""
    monkeypatch.setattr(tiles, "_refusal_by_architecture", {})


def step_of(model):
    step = torch.nn.Module()
    step.model, step.plan = model, StepPlan()
    return step


def built(tmp_path, architecture):
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir(tmp_path, architecture))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    return config, model


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in REFUSED])
def test_an_mlp_in_tiles_computes_the_same(tmp_path, architecture):
    config, model = built(tmp_path, architecture)
    ids = torch.arange(13)[None] % 500
    expected = model(input_ids=ids, use_cache=False).logits
    step = step_of(model)
    random_state = torch.random.get_rng_state()
    tile_mlps(step, config, model, ModelKind.causal, 4)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    calls = []
    mlp = next(module for name, module in model.named_modules() if name.endswith("mlp"))
    first_layer = next(module for module in mlp.modules() if next(module.parameters(recurse=False), None) is not None)
    first_layer.register_forward_hook(lambda _module, inputs, _out: calls.append(inputs[0].shape[-2]))
    found = model(input_ids=ids, use_cache=False).logits
    assert calls == [4, 4, 4, 1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert type(mlp).__name__ in step.plan.gathered_as_one
    found.sum().backward()
    assert mlp.forward.keywords == {} and all(p.grad is not None for p in mlp.parameters())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_is_refused(tmp_path, architecture):
    config, model = built(tmp_path, architecture)
    with pytest.raises(ConfigError, match="is a mixture of experts") as refused:
        tile_mlps(step_of(model), config, model, ModelKind.causal, 4)
    assert str(refused.value).startswith("strategy.mlp_tokens=4: ") and "set strategy.mlp_tokens=null" in str(
        refused.value
    )


def test_a_model_without_an_mlp_by_name_is_refused():
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(ConfigError, match="OPTDecoderLayer has no MLP by the name of mlp or feed_forward"):
        tile_mlps(step_of(model), config, model, ModelKind.causal, 4)


def test_an_mlp_that_looks_at_its_neighbours_is_refused(tmp_path, monkeypatch):
    """Like RWKV's, which mixes each token with the one before."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: forward(self, hidden + hidden.roll(1, dims=1)))
    config, model = built(tmp_path, "llama")
    with pytest.raises(ConfigError, match="looks at more than one token"):
        tile_mlps(step_of(model), config, model, ModelKind.causal, 4)
