"""Experts compute what transformers' own loop over them computes, in the precision of the run."""

import pytest
import torch
import transformers

from trainer.model import experts
from trainer.tuning.expert_parts import routers_by_name

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """The same weights with transformers' loop, and with ours."""
    experts.register()
    torch.manual_seed(0)
    made = [
        transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), experts_implementation=how)
        for how in ("eager", experts.EXPERTS_FUNCTION)
    ]
    made[1].load_state_dict(made[0].state_dict())
    return made


def _loss(model):
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss


def test_experts_loss_and_gradients_are_those_of_the_loop_over_experts(pair):
    stock, ours = pair
    assert _loss(ours).item() == pytest.approx(_loss(stock).item(), rel=1e-6)
    for name, parameter in stock.named_parameters():
        found = ours.get_parameter(name).grad
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_experts_under_autocast_multiply_in_its_type_with_gradients_for_the_masters(pair, monkeypatch):
    stock, ours = pair
    seen = set()
    real = torch.nn.functional.grouped_mm

    def watched(x, weight, **rest):
        seen.add((x.dtype, weight.dtype))
        return real(x, weight, **rest)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = _loss(ours), _loss(stock)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}


def test_experts_routers_are_found(pair):
    names = list(routers_by_name(pair[1]))
    assert len(names) == 2
    assert all(name.rsplit(".", 1)[1] in ("gate", "router") for name in names)
