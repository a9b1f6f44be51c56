"""Simulates one rank without its hardware: fake tensors, a process group that answers at once, the choices of a GPU.

The own engine of the run takes its steps on tensors that have shapes but no memory. The GPU is the device `SIMULATED`, the host
is the device "cpu". torch tells the two apart, refuses to mix them, and needs no build for GPUs. What torch or a library chooses
by the type of device is chosen as on a GPU: attention kernels, the types that autocast widens, pinned memory.
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
    rank: int,
    world_size: int,
    *,
    local_world_size: int = 8,
    device: torch.device = SIMULATED,
    expert_imbalance: float = 1.0,
) -> Iterator[Runtime]:
    """Let this process be rank `rank` of `world_size` ranks inside the context, though the other ranks do not exist.

    So a plan can take a rank's training step on one machine: torch's fake process group answers each collective at once. Yields
    the runtime of the rank. `local_world_size`: ranks of a host. `device`: SIMULATED stands for a GPU; "cpu" is the CPU itself.
    `expert_imbalance`: rows that arrive for the rank's experts, over the mean of its group (`parallel.experts`).

    Raises RuntimeError if this process is part of a job already.
    """
    from strategies.compat.fake_collectives import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rank is simulated in a process that is part of no job")
    # Other libraries import DeepSpeed. It would guess the device, and print its guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks_per_host = min(local_world_size, world_size)
    local_rank_before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_host)  # DeepSpeed reads it
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Runtime(
            rank=rank,
            world_size=world_size,
            local_rank=rank % ranks_per_host,
            local_world_size=ranks_per_host,
            device=device,
            control_group=dist.group.WORLD,
            simulated=True,
            expert_imbalance=expert_imbalance,
        )
    finally:
        dist.destroy_process_group()
        os.environ.pop("LOCAL_RANK")
        if local_rank_before is not None:
            os.environ["LOCAL_RANK"] = local_rank_before


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """A context for a simulated step: new tensors have shapes but no memory, and operations are chosen as on a GPU.

    `device`: of the simulated rank. `SIMULATED` stands for a GPU; with "cpu", operations are those of a CPU.
    """
    import strategies.compat.fake_collectives  # noqa: F401 - gives collectives of fake tensors their shapes
    from strategies.compat.fake_tensors import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        if device != SIMULATED:
            yield
            return
        with GpuDispatchMode():
            yield


def real_tensors() -> AbstractContextManager[Any]:
    """A context in which tensors are real even in a simulation, for small ones whose values are read."""
    from strategies.compat.fake_tensors import unset_fake_temporarily

    return unset_fake_temporarily()


def cached_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function that makes a constant tensor, such as a table of codes: it is called once for each set of arguments.

    Real tensors are kept for the life of the process. Fake ones, of a simulation, are kept in its mode and end with it: a later
    simulation could not use them.
    """
    real_tensor_by_arguments: dict[Any, Tensor] = {}

    @wraps(make)
    def cached(*arguments: Any) -> Tensor:
        fake_mode = active_fake_mode()
        if fake_mode is None:
            tensor_by_arguments = real_tensor_by_arguments
        else:
            # As an attribute of the mode, so that the tensors end with it.
            tensor_by_arguments = vars(fake_mode).setdefault(f"{make.__module__}.{make.__qualname__}", {})
        if arguments not in tensor_by_arguments:
            tensor_by_arguments[arguments] = make(*arguments)
        return tensor_by_arguments[arguments]

    mark_constant_when_compiled(cached)  # a compiled block contains the tensor itself
    return cached


# -- what torch chooses by the type of device -------------------------------------------------------------------------

_FLOAT32_FUNCTIONS_ON_GPU = frozenset(
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
"""Functions that autocast computes in float32 on GPUs. On CPUs it computes them in the type that they are given."""
_FACTORIES_FROM_VALUES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
"""Functions that make a tensor of Python's numbers. They make it on the device "cpu" where `SIMULATED` was asked for."""
_HALF_TYPES = (torch.bfloat16, torch.float16)


class GpuDispatchMode(TorchFunctionMode):
    """Lets functions do for tensors on `SIMULATED` what they do on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch calls this for each function inside the mode: call `func`, or what a GPU would do in its place.

        The tensors of a simulated GPU lie, for torch, on a CPU, where it would choose other attention kernels and other types
        under autocast, and would not pin memory.
        """
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention_as_on_gpu(*args, **kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._run_backward_in_mode(*args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.is_pinned:
            return True
        if func in _FACTORIES_FROM_VALUES:
            return _moved_to_simulated_device(func(*args, **kwargs), args, kwargs)
        if func in _FLOAT32_FUNCTIONS_ON_GPU and torch.is_autocast_enabled("cpu"):
            args = [_as_float32(argument) for argument in args]
            kwargs = {name: _as_float32(argument) for name, argument in kwargs.items()}
        return func(*args, **kwargs)

    def _run_backward_in_mode(
        self,
        tensors: Any,
        gradient: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Run a backward pass inside this mode, so that recomputed blocks choose as on a GPU too.

        Takes the arguments of `Tensor.backward` and of `torch.autograd.backward`, whose place it takes: these would leave the
        mode.
        """
        assert inputs is None, "no engine asks for the gradients of some tensors alone"
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        gradients = gradient if isinstance(gradient, tuple | list) else [gradient] * len(roots)
        root_gradients = []
        for tensor, root_gradient in zip(roots, gradients, strict=True):
            root_gradients.append(torch.ones_like(tensor) if root_gradient is None else root_gradient)
        with self:
            all_leaves: tuple[Tensor, ...] = ()  # gradients of all leaves, not of some inputs
            run_backward(  # the entry of torch's own engine, below `Tensor.backward`
                roots,
                tuple(root_gradients),
                bool(retain_graph),
                create_graph,
                all_leaves,
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _moved_to_simulated_device(tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Put a tensor that was made of Python's numbers on the simulated GPU, if the call that made it asked for that device.

    torch makes it on the CPU all the same; an empty one of its shape takes its place. `tensor`: what `torch.tensor` or another of
    `_FACTORIES_FROM_VALUES` has made of `args` and `kwargs`. It is returned as it is if

    - the call asked for another device, by `device=` or by the device of its source tensor;
    - it has a single number, which torch combines with tensors of any device, and whose value models read;
    - it is on the simulated device already.
    """
    requested_device = kwargs.get("device")
    source = args[0] if args else kwargs.get("data")  # `torch.tensor(data=...)` is possible, too
    if requested_device is None and torch.is_tensor(source):
        requested_device = source.device
    if requested_device != SIMULATED:
        return tensor
    is_single_number = tensor.dim() == 0
    if is_single_number or tensor.device == SIMULATED:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=SIMULATED)


def _as_float32(argument: Any) -> Any:
    """A half-precision tensor as float32; anything else as it is."""
    if torch.is_tensor(argument) and argument.dtype in _HALF_TYPES:
        return argument.float()
    return argument


def _attention_as_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention of a simulated step by the kernel that torch would choose on a GPU: its memory depends on the kernel.

    That is flash, memory-efficient, or plain products. The arguments are those of torch's `scaled_dot_product_attention`.
    """
    if query.device != SIMULATED:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    head_size = query.shape[-1]
    is_grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    is_half_without_mask = query.dtype in _HALF_TYPES and attn_mask is None
    can_use_flash = is_half_without_mask and head_size <= 256 and head_size == value.shape[-1]
    can_use_efficient = not is_grouped and query.dim() == 4
    if can_use_flash:
        # The flash kernel takes heads of multiples of 8: others are padded at their end.
        num_padding = -head_size % 8
        if num_padding:
            padding = (0, num_padding)
            query, key, value = F.pad(query, padding), F.pad(key, padding), F.pad(value, padding)
        if scale is None:
            scale = head_size**-0.5  # of the heads without padding
        return FLASH_ATTENTION(query, key, value, dropout_p, is_causal, scale=scale)[0][..., :head_size]
    if can_use_efficient:
        bias = None if attn_mask is None else _attention_bias(attn_mask, query, key)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return EFFICIENT_ATTENTION(query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale)[0]
    return ATTENTION_BY_PRODUCTS(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _attention_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """An attention mask as what is added to the scores, `[..., queries, keys]`: -inf where a boolean mask is False."""
    bias = mask
    if mask.dtype is torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return bias.expand(*query.shape[:-1], key.shape[-2])


# -- what engines take from the devices of their process group --------------------------------------------------------


def reduce_fake_gradients(wrapped: Any) -> None:
    """Let a DistributedDataParallel module (`wrapped`) reduce gradients in a simulation, whose tensors have no values.

    A hook of each gradient bucket calls the all-reduce, so that the simulation records it, and does not wait for it: on fake
    tensors it has no result. After its first pass DDP would put the buckets in another order, for which it reads values:
    `ReducerWithoutRebuild` leaves them.
    """

    def all_reduce_bucket(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer())
        completed: torch.futures.Future[Tensor] = torch.futures.Future()
        completed.set_result(bucket.buffer())
        return completed

    all_reduce_bucket.__annotations__ = {}  # torch compares a hook's annotations with types, and these are strings
    wrapped.register_comm_hook(None, all_reduce_bucket)
    wrapped.reducer = ReducerWithoutRebuild(wrapped.reducer)
