"""Recomputed blocks through the model's own interface."""

import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.activation import _checkpoint_kwargs, apply_checkpointing_and_compile
from strategies.base import ActivationCheckpointing, SingleConfig
from tests.helpers.models import tiny_model_dir
from trainer.objectives.sft import Sft
from trainer.step import TrainStep


@pytest.mark.parametrize("mode", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
def test_recomputation_calls_nothing_that_transformers_has_deprecated(mode, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_dir(tmp_path, "llama"))
    step = TrainStep(AutoModelForCausalLM.from_config(config), Sft(), {"LlamaDecoderLayer"})
    blocks = step.shard_units()
    assert blocks and not any(block.gradient_checkpointing for block in blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_checkpointing_and_compile(step, SingleConfig(activation_checkpointing=mode))
    assert all(block.gradient_checkpointing for block in blocks)
    kept = {"context_fn" in block._gradient_checkpointing_func.keywords for block in blocks}
    assert kept == {mode is ActivationCheckpointing.selective}


def test_compiled_blocks_recompute_all_but_products():
    """Torch tells the mode that it is given which part of the graph it is in, and fails where its own does not know."""
    backward = []

    def kept(graph, _):
        return graph

    def seen(graph, _):
        backward.extend(node.target for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(
        fw_compiler=kept,
        bw_compiler=seen,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )

    def block(x, w):
        return (x @ w).sin().exp()

    def loss(x, w):
        return checkpoint(block, x, w, **_checkpoint_kwargs(ActivationCheckpointing.selective)).sum()

    def gradients(compute):
        x, w = torch.ones(3, 4, requires_grad=True), torch.full((4, 5), 0.2, requires_grad=True)
        return torch.autograd.grad(compute(x, w), (x, w))

    found = gradients(torch.compile(loss, backend=backend))
    for one, other in zip(found, gradients(loss), strict=True):
        torch.testing.assert_close(one, other)
    aten = torch.ops.aten
    assert backward.count(aten.mm.default) == 2 and aten.sin.default in backward  # its two gradients alone
    torch.compiler.reset()
