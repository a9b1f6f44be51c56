"""A step with flex attention, on simulated GPUs: nothing is compiled, nothing is read, and the kernel's work is counted."""

from dataclasses import replace

import pytest

from strategies.base import ActivationCheckpointing, Precision, SingleConfig
from strategies.runtime import SIMULATED
from strategies.simulation import simulated_rank
from tests.helpers.building import model_dir, run_config
from trainer.model import attention, flex
from trainer.model.config import Attention, ModelConfig
from trainer.planner.simulate import simulate
from trainer.planner.simulation import build_step_parts

LENGTHS = [40, 24]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Findings of this test alone."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))


def stepped(model, kernel, checkpointing="none"):
    """What computes attention, and the step of two micro-batches with it."""
    strategy = SingleConfig(activation_checkpointing=ActivationCheckpointing(checkpointing))
    config = run_config(model, strategy, "full", micro=2, precision=Precision.bf16, batch={"global": 4, "micro": 2})
    config = replace(config, model=ModelConfig(path=str(model), attention=Attention(kernel)))
    with simulated_rank(0, 1, device=SIMULATED) as rank:
        parts = build_step_parts(config, LENGTHS, rank)
        return parts.built.attention, simulate(parts, rank)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_flex_attention_is_simulated_for_sinks_and_soft_caps_without_a_gpu(name, tmp_path):
    """Without a GPU in this machine; and the host waits for no value."""
    kernel, found = stepped(model_dir(tmp_path, name, head_dim=16), "auto")
    assert kernel == flex.FLEX_ATTENTION
    assert not found.host_reads


def test_flex_attention_work_is_that_of_the_documents_and_repeats_with_recomputation(tmp_path):
    model = model_dir(tmp_path, "llama", head_dim=16)
    (kernel, plain), (other, expected) = stepped(model, "flex"), stepped(model, "varlen")
    assert (kernel, other) == (flex.FLEX_ATTENTION, attention.VARLEN_ATTENTION)
    assert plain.flops == expected.flops, "half of each document's square, in both passes"
    again = {mode: stepped(model, "flex", mode)[1].flops for mode in ("selective", "full")}
    squares, layers, micro_batches, heads, width = sum(n * n for n in LENGTHS), 2, 2, 4, 16
    once = 4 * squares / 2 * heads * width * layers * micro_batches
    assert again["selective"] == plain.flops + once, "products are kept, and torch's flex attention is not"
    assert again["full"] > again["selective"]
