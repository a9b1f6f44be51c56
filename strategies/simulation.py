"""Simulates one rank without its hardware: fake tensors, a process group that answers at once, a GPU's choices.

The run's own engine takes its steps on tensors that have shapes and no memory. The GPU is the device `SIMULATED`; the
host is the device "cpu". torch tells them apart and refuses to mix them, and needs no build for GPUs. What torch or a
library chooses by the type of device is chosen as on a GPU: attention kernels, the types that autocast widens, pinned
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from strategies.compat.dispatch import (
    ATTENTION_BY_PRODUCTS,
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    active_fake_mode,
    mark_constant_when_compiled,
    run_backward,
)
from strategies.compat.process_groups import ReducerWithoutRebuild
from strategies.runtime import SIMULATED, Runtime


@contextmanager
def simulated_rank(
    rank: int, world_size: int, *, local_world_size: int = 8, device: torch.device = SIMULATED
) -> Iterator[Runtime]:
    """Rank `rank` of `world_size`, with `local_world_size` a host, in this process alone; its collectives return at once.

    `device` "cpu" stands for itself. Raises RuntimeError where this process is part of a job already.
    """
    from strategies.compat.fake_collectives import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rank is simulated in a process that is part of no job")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which other libraries import, would guess, and say so
    ranks_a_host = min(local_world_size, world_size)
    local_rank_before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank % ranks_a_host)  # DeepSpeed looks there
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Runtime(rank, world_size, rank % ranks_a_host, ranks_a_host, device, dist.group.WORLD, simulated=True)
    finally:
        dist.destroy_process_group()
        os.environ.pop("LOCAL_RANK")
        if local_rank_before is not None:
            os.environ["LOCAL_RANK"] = local_rank_before


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """Within it, tensors made anew have no memory, and those on `SIMULATED` are computed with as on a GPU."""
    import strategies.compat.fake_collectives  # noqa: F401 - gives collectives of fake tensors their shapes
    from strategies.compat.fake_tensors import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        if device != SIMULATED:
            yield
            return
        with AsOnGpu():
            yield


def real_tensors() -> AbstractContextManager[Any]:
    """Within it, tensors are real in a simulation too: for small ones whose values are looked at."""
    from strategies.compat.fake_tensors import unset_fake_temporarily

    return unset_fake_temporarily()


def cached_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make(*key)`, whose tensor is kept for its key: a real one for good, one without memory as long as its simulation."""
    real: dict[Any, Tensor] = {}

    @wraps(make)
    def cached(*key: Any) -> Tensor:
        mode = active_fake_mode()
        store = real if mode is None else vars(mode).setdefault(f"{make.__module__}.{make.__qualname__}", {})
        if key not in store:
            store[key] = make(*key)
        return store[key]

    mark_constant_when_compiled(cached)  # a compiled block has the tensor in it
    return cached


# -- what torch chooses by the type of device -------------------------------------------------------------------------

_FLOAT32_ON_GPU = frozenset(
    {
        F.layer_norm,
        torch.layer_norm,
        F.group_norm,
        torch.group_norm,
        F.softmax,
        torch.softmax,
        Tensor.softmax,
        F.log_softmax,
        torch.log_softmax,
        Tensor.log_softmax,
        F.softplus,
        F.nll_loss,
        F.kl_div,
        F.mse_loss,
        F.binary_cross_entropy_with_logits,
        torch.pow,
        Tensor.pow,
        Tensor.__pow__,
        torch.rsqrt,
        Tensor.rsqrt,
        torch.reciprocal,
        Tensor.reciprocal,
        torch.exp,
        Tensor.exp,
        torch.log,
        Tensor.log,
        torch.sum,
        Tensor.sum,
        torch.prod,
        torch.cumsum,
        Tensor.cumsum,
        Tensor.norm,
        torch.norm,
        torch.logsumexp,
        Tensor.logsumexp,
    }
)
"""What autocast computes in float32 on GPUs and, on CPUs, in the type that it is given."""
_HALF_TYPES = (torch.bfloat16, torch.float16)


class AsOnGpu(TorchFunctionMode):
    """What depends on the type of device, for tensors on `SIMULATED`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.is_pinned:
            return True
        if func in _FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args = [a.float() if torch.is_tensor(a) and a.dtype in _HALF_TYPES else a for a in args]
            kwargs = {k: v.float() if torch.is_tensor(v) and v.dtype in _HALF_TYPES else v for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _backward(
        self, root: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """What is recomputed on the way is chosen likewise: torch's own entry would leave this mode behind."""
        assert inputs is None, "no engine asks for the gradients of some tensors alone"
        roots = (root,) if isinstance(root, Tensor) else tuple(root)
        gradients = gradient if isinstance(gradient, tuple | list) else [gradient] * len(roots)
        root_gradients = tuple(torch.ones_like(r) if g is None else g for r, g in zip(roots, gradients, strict=True))
        with self:
            run_backward(
                roots,
                root_gradients,
                bool(retain_graph),
                create_graph,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch takes on a GPU for these arguments: flash, memory-efficient, or the plain products."""
    if query.device != SIMULATED:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    width = query.shape[-1]
    if query.dtype in _HALF_TYPES and attn_mask is None and width <= 256 and width == value.shape[-1]:
        pad = -width % 8
        if pad:
            query, key, value = (F.pad(t, (0, pad)) for t in (query, key, value))
        scale = scale if scale is not None else width**-0.5
        return FLASH_ATTENTION(query, key, value, dropout_p, is_causal, scale=scale)[0][..., :width]
    if not grouped and query.dim() == 4:
        bias = attn_mask
        if bias is not None:
            if bias.dtype is torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
            bias = bias.expand(*query.shape[:-1], key.shape[-2])
        grads = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return EFFICIENT_ATTENTION(query, key, value, bias, grads, dropout_p, is_causal, scale=scale)[0]
    return ATTENTION_BY_PRODUCTS(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


# -- what engines take from the devices of their process group --------------------------------------------------------


def reduce_without_reading(wrapped: Any) -> None:
    """Let a DistributedDataParallel module work on fake tensors: its all-reduce has no result to wait for."""

    def reduce(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    reduce.__annotations__ = {}  # torch compares them, which are strings here, with its own types
    wrapped.register_comm_hook(None, reduce)
    wrapped.reducer = ReducerWithoutRebuild(wrapped.reducer)
