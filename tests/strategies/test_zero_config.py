"""What DeepSpeed is told, by device, precision and size."""

from types import SimpleNamespace

import pytest

from strategies.base import Precision, StrategyName, ZeroConfig
from strategies.memory import estimated_state_bytes
from strategies.parameters import named_parameters
from strategies.zero_config import MIB, deepspeed_config, steps_on_device
from tests.helpers.models import tiny_model_dir
from trainer.objectives.sft import Sft
from trainer.step import TrainStep

ZERO1, ZERO2 = ZeroConfig(name=StrategyName.zero1, stage=1), ZeroConfig()
FUSED, PLAIN = SimpleNamespace(_step_supports_amp_scaling=True), SimpleNamespace()


def settings(config=ZERO2, **changes):
    return deepspeed_config(config, **{"precision": Precision.bf16, "max_grad_norm": 0.5, "on_cpu": False} | changes)


def to_all(**changes):
    return settings(**changes)["zero_optimization"]["use_multi_rank_bucket_allreduce"]


def test_gradients_go_to_their_owners_where_a_bucket_has_few():
    """8 billion parameters on 8 ranks, and on 1,024; a bucket holds 105 million elements."""
    assert not to_all(trained_per_rank=10**9) and not to_all(trained_per_rank=200 * MIB // 8)
    assert to_all(trained_per_rank=8 * 10**6) and to_all(trained_per_rank=0)
    assert to_all(trained_per_rank=10**9, on_cpu=True)


@pytest.mark.parametrize(
    ("config", "precision", "optimizer", "expected"),
    [
        (ZERO2, Precision.bf16, FUSED, True),
        (ZERO2, Precision.bf16, PLAIN, False),  # cannot leave a step out by itself
        (ZERO2, Precision.fp16, FUSED, False),  # DeepSpeed's loss scale is kept on the host
        (ZERO2, Precision.fp32, FUSED, False),
        (ZERO1, Precision.bf16, FUSED, False),
        (ZeroConfig(offload_optimizer="cpu"), Precision.bf16, FUSED, False),
    ],
)
def test_steps_are_decided_on_the_device_where_the_optimizer_can(config, precision, optimizer, expected):
    assert steps_on_device(config, precision, optimizer) is expected


def test_zero_config_clips_in_deepspeed_or_in_our_engine():
    theirs, ours = settings(), settings(clips_on_device=True)
    assert (theirs["gradient_clipping"], theirs["bf16"]["check_grad_overflow"]) == (0.5, True)
    assert (ours["gradient_clipping"], ours["bf16"]["check_grad_overflow"]) == (0.0, False)
    assert theirs["bf16"]["immediate_grad_update"]


@pytest.mark.parametrize(("precision", "size"), [(Precision.bf16, 4), (Precision.fp16, 2), (Precision.fp32, 4)])
def test_stage_1_keeps_whole_gradients(precision, size, tmp_path):
    """In fp32 where gradients are summed in it; bf16 would be two bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir(tmp_path, "llama")))
    step = TrainStep(model, Sft(), {"LlamaDecoderLayer"})
    trained = sum(p.numel() for _, p in named_parameters(step))
    parameters = trained * (4 if precision is Precision.fp32 else 2)
    sharded = trained * (4 + 8) / 8  # masters and the moments of AdamW
    found = estimated_state_bytes(step, ZERO1, precision, world_size=8, num_replicas=1)
    assert found == parameters + size * trained + sharded
