"""One layer of experts over ranks, against all experts in one process. Part of the parity job (`job.py`)."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from strategies import expert_parallelism
from strategies import runtime as processes
from tests.helpers.building import run_config
from tests.models.tiny import tiny_config
from tests.parity.base import Job
from tests.parity.dealt import in_chunks
from trainer.build.experts import build_model_on_meta, expert_parallelism_problems_of_models
from trainer.config.parallel import ParallelConfig
from trainer.model import expert_exchange
from trainer.model.compat import grouped_experts
from trainer.model.config import ModelKind
from trainer.tuning.expert_parts import expert_modules_by_name


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one rank gives to a layer of experts, and the direction in which the output is differentiated."""

    hidden: torch.Tensor
    """`[tokens, width]`"""
    chosen: torch.Tensor
    """`[tokens, 2]`, experts of each token."""
    weights: torch.Tensor
    """`[tokens, 2]`, of the router."""
    direction: torch.Tensor
    """`[tokens, width]`"""


def layer(job: Job, kind: str, ranks: int, beside: str) -> list[float]:
    """Largest relative differences of one layer of qwen3_moe over ranks from `beside`: output, gradients of inputs and weights.

    `beside`: `whole`, all experts in one process, or `transformers`, its own exchange. `kind`: `spread`, `to one rank` (and so
    none to the others), `none` (a rank without tokens), `beyond` (some choices compute nothing), `chunks`.
    """
    _, (whole,) = _layers_of(job, "qwen3_moe", ranks)
    return _compared(job, whole, kind, ranks, beside)


def family(job: Job, name: str, ranks: int) -> dict[str, Any]:
    """What becomes of an architecture's experts over ranks: `problems`, why they are refused, or `differences` of each layer.

    The differences are those of `layer` from the layer's own forward pass in transformers, which loops over the experts.
    """
    problems, layers = _layers_of(job, name, ranks)
    differences = {}
    if not problems:
        differences = {type(whole).__name__: _compared(job, whole, "spread", ranks, "eager") for whole in layers}
    return {"problems": problems, "differences": differences}


def _layers_of(job: Job, name: str, ranks: int) -> tuple[list[str], list[Any]]:
    """(why the experts of an architecture cannot be spread over `ranks` ranks; a random layer of each class of experts)."""
    path = job.root / "architectures" / name
    job.first_here(lambda: None if path.exists() else tiny_config(name).save_pretrained(path))
    config = run_config(path, "fsdp2", "full", micro=4, parallel=ParallelConfig(experts=ranks))
    model = build_model_on_meta(config.model, ModelKind.causal)
    models = {f"model.path={name}": model}
    problems = expert_parallelism_problems_of_models(config, models, num_ranks=job.runtime.world_size, num_hosts=1)
    layers: dict[type, Any] = {}
    for module in expert_modules_by_name(model).values():
        layers.setdefault(type(module), module.to_empty(device="cpu"))
    generator = torch.Generator().manual_seed(11)
    for module in layers.values():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return problems, list(layers.values())


def _compared(job: Job, whole: Any, kind: str, ranks: int, beside: str) -> list[float]:
    """The differences of `layer`, for the layer `whole`. `beside` may be `eager` too: the layer's own forward pass."""
    rank = job.runtime.rank
    inputs = _inputs_of_ranks(whole, kind, ranks, job.runtime.world_size)
    spread = copy.deepcopy(whole)
    expert_parallelism.distribute_experts(
        [spread], torch.device("cpu"), job.runtime, num_replicas=1, expert_ranks=ranks
    )
    share = spread.expert_share
    own = whole.num_experts // ranks
    held = slice(share.group_rank * own, (share.group_rank + 1) * own)
    for name, parameter in spread.named_parameters():
        parameter.data = whole.get_parameter(name).data[held].clone()

    def exchanged(hidden: Any, chosen: Any, weights: Any) -> Any:
        with in_chunks(5) if kind == "chunks" else nullcontext():
            return expert_exchange.expert_parallel_forward(spread, share, hidden, chosen, weights, None)

    found = _pass(exchanged, spread, inputs[rank])
    if beside == "transformers":
        expected = _pass(*_by_transformers(whole, held, own, share.group), inputs[rank])
    else:
        first = rank - share.group_rank
        expected = _whole_pass(whole, inputs[first : first + ranks], share.group_rank, held, beside)
    differences = []
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().max()) if other.numel() else 1.0
        difference = float((one - other).abs().max()) if one.numel() else 0.0
        differences.append(difference / max(largest, 1e-3))
    by_rank = processes.gather_objects(differences, job.runtime)
    return [max(column) for column in zip(*by_rank, strict=True)]


def _inputs_of_ranks(whole: Any, kind: str, ranks: int, world: int) -> list[Inputs]:
    """What each of `world` ranks gives to the layer `whole`, whose experts lie on `ranks` ranks. `kind`: see `layer`."""
    generator = torch.Generator().manual_seed(12)
    num_experts = whole.num_experts
    down = whole.down_proj  # [experts, in, out], or [experts, out, in]
    width = down.shape[-1] if whole.is_transposed else down.shape[-2]
    inputs = []
    for rank in range(world):
        num_tokens = 0 if kind == "none" and rank == 2 else 7 + 3 * rank
        hidden = torch.randn(num_tokens, width, generator=generator)
        scores = torch.rand(num_tokens, num_experts, generator=generator)
        weights, chosen = scores.topk(2)
        if kind == "to one rank":
            chosen = chosen % (num_experts // ranks)
        if kind == "beyond":
            chosen[1::3, 1] = num_experts
        inputs.append(Inputs(hidden, chosen, weights, torch.randn(num_tokens, width, generator=generator)))
    return inputs


def _pass(compute: Any, module: Any, inputs: Inputs) -> list[torch.Tensor]:
    """Output of a rank's tokens, and the gradients of hidden states, router weights and parameters."""
    hidden = inputs.hidden.clone().requires_grad_()
    weights = inputs.weights.clone().requires_grad_()
    output = compute(hidden, inputs.chosen, weights)
    (output * inputs.direction).sum().backward()
    assert hidden.grad is not None and weights.grad is not None
    return [output.detach(), hidden.grad, weights.grad, *(parameter.grad for parameter in module.parameters())]


def _whole_pass(whole: Any, inputs: list[Inputs], group_rank: int, held: slice, how: str) -> list[torch.Tensor]:
    """The same by one process: parameters get the gradients of all tokens of the group.

    `inputs`: of the ranks of the group. `how`: the layer's own pass (`eager`), or transformers' grouped products (`whole`).
    """
    whole.zero_grad()

    def grouped(hidden: Any, chosen: Any, weights: Any) -> Any:
        # A choice beyond the experts adds nothing.
        is_expert = chosen < whole.num_experts
        return grouped_experts(whole, hidden, chosen.clamp(max=whole.num_experts - 1), weights * is_expert)

    compute = grouped
    if how == "eager":
        whole.config = copy.deepcopy(whole.config)
        whole.config._experts_implementation = "eager"
        compute = whole
    passes = [_pass(compute, whole, given) for given in inputs]
    return [*passes[group_rank][:3], *(parameter.grad[held] for parameter in whole.parameters())]


def _by_transformers(whole: Any, held: slice, own: int, group: Any) -> tuple[Any, Any]:
    """The exchange of `AllToAllEP`, and the experts of this rank that it computes with."""
    from transformers.distributed.expert_parallel import AllToAllEP

    local = copy.deepcopy(whole)
    local.config = copy.deepcopy(whole.config)
    local.config._experts_implementation = "grouped_mm"
    for name, parameter in whole.named_parameters():
        setattr(local, name, torch.nn.Parameter(parameter.data[held].clone()))
    local.num_experts = own
    local._is_expert_parallel = True
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)

    class Mesh:
        def __init__(self, group: Any) -> None:
            self.group = group

        def size(self) -> int:
            return dist.get_world_size(self.group)

        def get_group(self) -> Any:
            return self.group

    return AllToAllEP(local, Mesh(group), Mesh(alone)), local
