"""Chooses the blocks that recompute activations, so that a step fits a memory budget with the least recomputation.

What a block keeps is counted, not guessed: the step module runs once forward on the meta device, where tensors have
shapes and no memory, and autograd's own hooks report what it saves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strategies.activation import is_kept
from strategies.base import ActivationCheckpointing, Precision
from strategies.compat.dispatch import TorchDispatchMode, storage_key
from strategies.parameters import COMPUTE_DTYPE, set_dtypes


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that one micro-batch leaves behind for its backward pass; lists have an entry a block."""

    none: list[float]
    """Kept by a block that recomputes nothing."""
    selective: list[float]
    """Kept where products and attention are saved and the rest is recomputed."""
    full: list[float]
    """Kept where only a block's input is saved."""
    outside: float
    """Kept outside the blocks: embeddings, head, loss."""
    transient: float
    """The largest tensors made outside the blocks and not kept (logits of a chunk, twice)."""

    def total(self, modes: list[ActivationCheckpointing]) -> float:
        """Bytes at the peak: what all blocks keep, and what the one that is recomputed makes."""
        kept_bytes = sum(getattr(self, mode.value)[i] for i, mode in enumerate(modes))
        recomputed_bytes = [self.none[i] for i, mode in enumerate(modes) if mode is not ActivationCheckpointing.none]
        return self.outside + kept_bytes + max(recomputed_bytes, default=0.0) + self.transient


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: inputs, output and one sum a row. Meta tensors would take the T x T path."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("only shapes were asked for")


class _ShapesOfFlashAttention(TorchFunctionMode):
    """Within it, attention leaves behind what flash attention does, whatever kernel the device would choose."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return _Attention.apply(query, key, value)  # type: ignore[no-any-return]


class _ActivationCounter(TorchDispatchMode):
    """Sums up what autograd saves and what costly operations make, by the block in which it happens."""

    def __init__(self, blocks: list[nn.Module], parameters: list[Tensor]) -> None:
        super().__init__()
        self.current = len(blocks)  # outside all blocks
        self.saved, self.kept_products, self.inputs = ([0.0] * (len(blocks) + 1) for _ in range(3))
        self.largest_outside = 0.0
        self._counted_storages: dict[int, Any] = {}
        self._parameter_storages = [
            p.untyped_storage() for p in parameters
        ]  # kept alive: an address is unique only while it is used
        self._parameter_keys = {storage_key(s) for s in self._parameter_storages}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._counted_storages and key not in self._parameter_keys:
            self._counted_storages[key] = storage
            self.saved[self.current] += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            size = out.untyped_storage().nbytes()
            if is_kept(func):
                self.kept_products[self.current] += size
            if self.current == len(self.saved) - 1:
                self.largest_outside = max(self.largest_outside, size)
        return out

    def enter(self, index: int, hidden: Tensor | None) -> None:
        self.current = index
        if hidden is not None:
            self.inputs[index] = hidden.untyped_storage().nbytes()

    def leave(self) -> None:
        self.current = len(self.saved) - 1


def count_activations(step_module: nn.Module, batch: dict[str, Any], precision: Precision) -> Activations:
    """What the micro-batch `batch` leaves behind in a step module whose parameters are on meta; allocates nothing.

    Counted in the compute type. Where autocast casts the weights as it goes (single, ddp), their copies come on top.
    """
    compute = COMPUTE_DTYPE[precision]
    probe = copy.deepcopy(step_module)
    set_dtypes(probe, trainable=compute, frozen=compute)
    probe.to("meta")  # buffers
    probe.train()
    blocks = probe.shard_units()  # type: ignore[operator]
    counter = _ActivationCounter(blocks, [*probe.parameters(), *probe.buffers()])
    for index, block in enumerate(blocks):

        def enter(_m: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            hidden_states = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            counter.enter(index, next(hidden_states, None))

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(lambda *_: counter.leave())
    meta_batch = _on_meta(batch)
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
    with torch.enable_grad(), _ShapesOfFlashAttention(), counter, hooks:
        terms = probe(meta_batch)
    del terms
    none, inputs = counter.saved[:-1], counter.inputs[:-1]
    selective = [
        min(kept, made + hidden_states)
        for kept, made, hidden_states in zip(none, counter.kept_products, inputs, strict=False)
    ]
    return Activations(none, selective, inputs, counter.saved[-1], 2 * counter.largest_outside)


def _on_meta(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors, those of batches within it too, as shapes."""
    return {
        key: entry.to("meta") if torch.is_tensor(entry) else _on_meta(entry) if isinstance(entry, dict) else entry
        for key, entry in batch.items()
    }


def plan_blocks(activations: Activations, budget: float) -> tuple[list[ActivationCheckpointing], bool]:
    """(what each block does, whether the peak fits): as few blocks as the budget in bytes needs, the milder means first.

    Earlier blocks recompute first: what they keep lives longest, until the end of the backward pass.
    """
    none, selective, full = (ActivationCheckpointing(name) for name in ("none", "selective", "full"))
    modes = [none] * len(activations.none)
    for milder, stronger in ((none, selective), (selective, full)):
        for index in range(len(modes)):
            if activations.total(modes) <= budget:
                return modes, True
            if modes[index] is milder:
                modes[index] = stronger
    return modes, activations.total(modes) <= budget
