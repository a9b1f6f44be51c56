"""A small copy keeps heads and experts, says what shrank, and has routers that no rounding changes."""

import pytest
import torch
import transformers

from strategies.errors import ConfigError
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import load_tokenizer
from trainer.verification.small_model import write_small_model


def small_copy(tmp_path, name, **settings):
    """A copy of a model of which there is no more than a config.json."""
    getattr(transformers, name)(**settings).save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"))
    return write_small_model(config, ModelKind.causal, tmp_path / "copy", num_outputs=None)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (
            "DeepseekV3Config",
            {
                "num_attention_heads": 128,
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "n_group": 8,
                "topk_group": 4,
            },
        ),
        ("GPT2Config", {"n_head": 12}),
    ],
)
def test_a_copy_keeps_the_numbers_by_which_ranks_divide_work(tmp_path, name, kept):
    state = torch.random.get_rng_state()
    small = small_copy(tmp_path, name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert kept.items() <= small.kept.items()
    assert small.num_parameters < 3_000_000 and not set(small.changed) & set(kept)
    depths = [sizes for key, sizes in small.changed.items() if key in ("num_hidden_layers", "n_layer")]
    assert all(copy < full for full, copy in depths) and depths
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert all(bool((parameter != 0).any()) for parameter in model.parameters())
    assert len(load_tokenizer(ModelConfig(path=str(tmp_path / "copy")))) == model.config.vocab_size == 128


def test_routers_are_far_fonder_of_the_experts_that_they_take(tmp_path):
    settings = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = small_copy(tmp_path, "Qwen3MoeConfig", num_experts=12, num_experts_per_tok=3, **settings)
    assert small.num_decided_routers == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_router_logits=True)
    ids = torch.randint(4, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = torch.cat(model(ids, output_router_logits=True).router_logits)
    best = logits.sort(dim=-1, descending=True)
    margins = best.values[:, 2] - best.values[:, 3]
    assert float(margins.min()) > 0.2 * float(best.values[:, 2].abs().mean())
    assert best.indices[:, :3].unique().numel() == 12


def test_a_model_of_which_no_copy_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.verification.small_model.MAX_PARAMETERS", 1000)
    with pytest.raises(ConfigError, match=r"none can be made of this gpt2 \(NotShrinkable: a small copy would have"):
        small_copy(tmp_path, "GPT2Config")
