"""Keeps the inputs of recomputed blocks in pinned host memory between the forward and the backward pass.

With full recomputation, a block's input is what its backward pass needs to begin with. Over all blocks these inputs are
`blocks x tokens x width` values: at a million tokens the largest part of a rank's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from strategies.errors import ConfigError
from strategies.pinned_memory import HostTensors


class HostInputs:
    """Wraps the checkpoint function of blocks, so that a block's hidden states wait on the host.

    The copies run on the compute stream: they are in order with what writes and reads the tensors, and the host waits for
    none of them.
    """

    def __init__(self) -> None:
        self.num_live_tensors = 0
        """Tensors that are on the host now."""
        self.live_bytes = 0
        self.peak = HostTensors()
        """The most tensors that were on the host at one time since `begin_step`."""

    def begin_step(self) -> None:
        """Forget the peak of earlier steps."""
        self.peak = HostTensors(self.num_live_tensors, self.live_bytes)

    def wrap_checkpoint_function(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap torch's activation checkpointing, so that the hidden states that go into a block wait on the host.

        `checkpoint(function, *inputs)` runs a block and saves its inputs for the recomputation in the backward pass. Returns a
        function with the same arguments.
        """
        return partial(self._checkpoint_from_host, checkpoint)

    def _checkpoint_from_host(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block by torch's activation checkpointing, with the hidden states that go into it saved on the host.

        `checkpoint(function, *inputs)`: runs `function`, the block, and saves `inputs` for its recomputation. The first
        floating-point tensor among them is taken for the hidden states; on the host already, they stay there. Raises ConfigError
        if there is none.
        """
        hidden = next((tensor for tensor in inputs if _is_float(tensor)), None)
        if hidden is None:
            raise ConfigError(
                "strategy.offload_activations=true: this model hands its blocks their hidden states by name, where "
                "they cannot be told from what all blocks share; set strategy.offload_activations=false"
            )
        if is_on_host(hidden):
            return checkpoint(function, *inputs)

        hidden_shape = hidden.shape  # not the tensor: a hook that refers to it would keep it on the device

        def pack(saved: Tensor) -> Any:
            # Masks and positions stay on the device, since all blocks share them. Hidden states are told by their shape:
            # another tensor of the block's inputs with that shape, such as a residual, waits on the host as well.
            is_hidden = saved.shape == hidden_shape and _is_float(saved)
            return (saved.device, self._copy_to_host(saved)) if is_hidden else saved

        with saved_tensors_hooks(pack, _unpack):
            return checkpoint(function, *inputs)

    def _copy_to_host(self, tensor: Tensor) -> Tensor:
        """Copy a block's input to the host; from a GPU, to pinned memory without waiting. It is counted as long as it lives.

        The counts are for reports: how much host memory a simulated or a real step takes for inputs.
        """
        is_on_gpu = tensor.device.type == "cuda"  # a simulated GPU has no pinned memory
        host_copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_on_gpu)
        host_copy.copy_(tensor, non_blocking=is_on_gpu)
        num_bytes = tensor.numel() * tensor.element_size()
        self.num_live_tensors += 1
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak.num_bytes:
            self.peak = HostTensors(self.num_live_tensors, self.live_bytes)
        # Uncounts it when nothing refers to it; at the end of the process there is nothing left to count.
        weakref.finalize(host_copy, self._uncount, num_bytes).atexit = False
        return host_copy

    def _uncount(self, num_bytes: int) -> None:
        self.num_live_tensors -= 1
        self.live_bytes -= num_bytes


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor is in the host's memory already. A simulated GPU is `cpu:0`, the host is `cpu`."""
    return tensor.device.type == "cpu" and tensor.device.index is None


def _unpack(packed: Any) -> Tensor:
    """A saved tensor on its device: as it is, or copied back from a (device, host copy) pair."""
    if isinstance(packed, Tensor):
        return packed
    device, copy = packed
    return copy.to(device, non_blocking=True)  # type: ignore[no-any-return]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
