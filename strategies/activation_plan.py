"""Chooses which blocks recompute activations, so that a step fits a memory budget with as little recomputation as possible.

What a block keeps is counted, not guessed. The step module makes one forward pass on the meta device, where tensors have shapes
but no memory, and autograd's own hooks report what it saves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strategies.activation import is_kept_op
from strategies.base import ActivationCheckpointing, Precision
from strategies.compat.dispatch import GROUPED_PRODUCT, TorchDispatchMode, storage_key
from strategies.expert_parallelism import keep_one_rank_of_experts_on_meta
from strategies.parameters import COMPUTE_DTYPE, set_parameter_dtypes


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes of activations that one micro-batch keeps for its backward pass, by mode of recomputation; each list by block."""

    bytes_by_block_if_none: list[float]
    """Kept by a block that recomputes nothing."""
    bytes_by_block_if_selective: list[float]
    """Kept by a block that saves products and attention, and recomputes the rest."""
    bytes_by_block_if_full: list[float]
    """Kept by a block that saves only its input."""
    bytes_outside_blocks: float
    """Kept outside the blocks: embeddings, head, loss."""
    transient_bytes: float
    """The largest tensors that are made outside the blocks and not kept (the logits of a chunk, twice)."""

    def with_inputs_on_host(self) -> ActivationBytes:
        """The counts with `strategy.offload_activations`: inputs of blocks that recompute wait on the host, and do not count."""
        # What a block keeps if it recomputes in full is its inputs.
        selective = [
            kept - inputs
            for kept, inputs in zip(self.bytes_by_block_if_selective, self.bytes_by_block_if_full, strict=True)
        ]
        return replace(
            self,
            bytes_by_block_if_selective=[max(0.0, kept) for kept in selective],
            bytes_by_block_if_full=[0.0] * len(self.bytes_by_block_if_full),
        )

    @property
    def num_blocks(self) -> int:
        """Transformer blocks, each with an entry in the lists."""
        return len(self.bytes_by_block_if_none)

    def peak_bytes(self, modes: list[ActivationCheckpointing]) -> float:
        """Bytes of activations that are live at once at most in a step, if each block recomputes as its entry of `modes` says."""
        bytes_by_mode = {
            ActivationCheckpointing.none: self.bytes_by_block_if_none,
            ActivationCheckpointing.selective: self.bytes_by_block_if_selective,
            ActivationCheckpointing.full: self.bytes_by_block_if_full,
        }
        kept_bytes = 0.0
        recomputed_bytes = 0.0
        for block_index, mode in enumerate(modes):
            kept_bytes += bytes_by_mode[mode][block_index]
            if mode is not ActivationCheckpointing.none:
                # In the backward pass of a block that recomputes, all its activations exist again: of one block at a time.
                recomputed_bytes = max(recomputed_bytes, self.bytes_by_block_if_none[block_index])
        return self.bytes_outside_blocks + kept_bytes + recomputed_bytes + self.transient_bytes


class _FlashAttentionShapes(torch.autograd.Function):
    """Saves what flash attention saves: inputs, output and one sum a row. On meta, torch would save T x T scores instead."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("this forward pass is for counting, and has no backward pass")


class _ShapesOfFlashAttention(TorchFunctionMode):
    """A mode in which attention saves the tensors of flash attention, whatever kernel the device would choose."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return _FlashAttentionShapes.apply(query, key, value)  # type: ignore[no-any-return]


class _ActivationCounter(TorchDispatchMode):
    """Adds up, block by block, the bytes that autograd saves and the bytes that costly operations make."""

    def __init__(self, blocks: list[nn.Module], parameters: list[Tensor]) -> None:
        """Begin to count the memory of a forward pass, block by block, at 0.

        `blocks`: the model's transformer blocks. `parameters`: its parameters and buffers, which are no activations.
        """
        super().__init__()
        self.outside_blocks_index = len(blocks)
        """Index for everything outside the blocks, behind those of the blocks."""
        # Bytes by block, and outside the blocks.
        self.saved_bytes = [0.0] * (len(blocks) + 1)
        self.kept_op_bytes = [0.0] * (len(blocks) + 1)
        self.input_bytes = [0.0] * (len(blocks) + 1)
        self.current_block = self.outside_blocks_index
        """Index of the block that runs, or `outside_blocks_index`."""
        self.largest_tensor_outside = 0.0
        self._counted_storages: dict[int, Any] = {}
        # A storage is told by its address, which is unique only while the storage lives: these references keep it alive.
        self._parameter_storages = [parameter.untyped_storage() for parameter in parameters]
        self._parameter_keys = {storage_key(storage) for storage in self._parameter_storages}

    def count_saved_tensor(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved for the backward pass, in the block that runs: a hook, of which autograd saves the result.

        Tensors that share a storage count once. Parameters and buffers do not count, since they are no activations.
        """
        # A storage is told by its address: counted ones stay alive, so that no other gets the address of one.
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._counted_storages and key not in self._parameter_keys:
            self._counted_storages[key] = storage
            self.saved_bytes[self.current_block] += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation `func`, and count the bytes of its output: torch calls this for each operation in the context.

        Counted are outputs that selective checkpointing would keep, by block, and the largest tensor outside the blocks.
        """
        if func is GROUPED_PRODUCT.default:
            out = _shape_of_grouped_product(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            size = out.untyped_storage().nbytes()
            if is_kept_op(func):
                self.kept_op_bytes[self.current_block] += size
            if self.current_block == self.outside_blocks_index:
                self.largest_tensor_outside = max(self.largest_tensor_outside, size)
        return out

    def enter_block(self, index: int, hidden: Tensor | None) -> None:
        """Block `index` begins, with the hidden states `hidden`."""
        self.current_block = index
        if hidden is not None:
            self.input_bytes[index] = hidden.untyped_storage().nbytes()

    def leave_block(self) -> None:
        """No block runs any more: what comes now counts as outside the blocks."""
        self.current_block = self.outside_blocks_index

    def watch_block(self, index: int, block: nn.Module) -> None:
        """Put hooks on the block with this index, which say when it begins and ends."""

        def enter_block(_block: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter_block(index, _first_float_tensor((*args, *kwargs.values())))

        block.register_forward_pre_hook(enter_block, with_kwargs=True)
        block.register_forward_hook(lambda *_: self.leave_block())

    def activation_bytes(self) -> ActivationBytes:
        """The bytes that were counted in the forward pass, for each way in which a block may recompute."""
        saved_bytes_by_block = self.saved_bytes[: self.outside_blocks_index]
        input_bytes_by_block = self.input_bytes[: self.outside_blocks_index]
        kept_op_bytes_by_block = self.kept_op_bytes[: self.outside_blocks_index]
        # A block keeps its input and the results of costly operations, and no more than without recomputation.
        selective = []
        for saved_bytes, kept_op_bytes, input_bytes in zip(
            saved_bytes_by_block, kept_op_bytes_by_block, input_bytes_by_block, strict=True
        ):
            selective.append(min(saved_bytes, kept_op_bytes + input_bytes))
        return ActivationBytes(
            bytes_by_block_if_none=saved_bytes_by_block,
            bytes_by_block_if_selective=selective,
            bytes_by_block_if_full=input_bytes_by_block,
            bytes_outside_blocks=self.saved_bytes[self.outside_blocks_index],
            # Twice: the logits of a chunk, and as much again that the loss makes of them.
            transient_bytes=2 * self.largest_tensor_outside,
        )


def _shape_of_grouped_product(left: Tensor, right: Tensor, *_: Any, **_more: Any) -> Tensor:
    """The output of a grouped product on meta: `[S, b]` of `[S, a]` and `[E, a, b]`. torch itself can do that in bf16 only."""
    assert (left.dim(), right.dim()) == (2, 3), (
        "a forward pass of experts has rows by groups, each with a matrix of its own"
    )
    return left.new_empty(left.shape[0], right.shape[-1])


def count_activations(step_module: nn.Module, batch: dict[str, Any], precision: Precision) -> ActivationBytes:
    """Count how much memory a micro-batch keeps for its backward pass, to choose which blocks recompute.

    A copy of the model makes a forward pass on meta, where nothing is allocated or computed. `step_module`: the model with its
    loss, on meta. `batch`: a micro-batch of the run's sizes. `precision`: activations are counted in the type in which it
    computes. If autocast casts the weights on the way (single, ddp), their copies come on top.
    """
    compute_dtype = COMPUTE_DTYPE[precision]
    probe = copy.deepcopy(step_module)
    set_parameter_dtypes(probe, trainable=compute_dtype, frozen=compute_dtype)
    probe.to("meta")  # buffers are real until here
    keep_one_rank_of_experts_on_meta(probe)  # with `parallel.experts`, a rank computes some experts only
    probe.train()
    blocks = probe.shard_units()  # type: ignore[operator]  # the repeated blocks, in forward order
    counter = _ActivationCounter(blocks, [*probe.parameters(), *probe.buffers()])
    for index, block in enumerate(blocks):
        counter.watch_block(index, block)
    # autograd calls the hook for each tensor that it saves for the backward pass.
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.count_saved_tensor, lambda tensor: tensor)
    meta_batch = _batch_on_meta(batch)
    with torch.enable_grad(), _ShapesOfFlashAttention(), counter, hooks:
        terms = probe(meta_batch)
    del terms  # with them goes what autograd has saved
    return counter.activation_bytes()


def _first_float_tensor(arguments: tuple[Any, ...]) -> Tensor | None:
    """A block's hidden states: the first floating-point tensor among its arguments."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument
    return None


def _batch_on_meta(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to meta, also those of batches inside it, for a forward pass that computes nothing."""
    moved: dict[str, Any] = {}
    for key, entry in batch.items():
        if torch.is_tensor(entry):
            moved[key] = entry.to("meta")
        elif isinstance(entry, dict):
            moved[key] = _batch_on_meta(entry)
        else:
            moved[key] = entry
    return moved


class RecomputationChoice(NamedTuple):
    """What the blocks of a model recompute."""

    modes: list[ActivationCheckpointing]
    """Of each block, in forward order."""
    fits: bool
    """Whether the activations at the peak fit the budget."""


def choose_recomputation(activations: ActivationBytes, budget_bytes: float) -> RecomputationChoice:
    """Choose what each block recomputes (`activation_checkpointing=auto`), so that activations fit in `budget_bytes`.

    As few blocks as possible recompute, and selectively if that is enough. Earlier blocks recompute first: what they keep lives
    longest, until the end of the backward pass. `activations`: what a block keeps in each mode. If they take more even with all
    blocks recomputed in full, `fits` is False.
    """
    modes = [ActivationCheckpointing.none] * activations.num_blocks
    # First all blocks in turn become selective, then, if that is not enough, all in turn become full.
    for stronger_mode in (ActivationCheckpointing.selective, ActivationCheckpointing.full):
        for block_index in range(activations.num_blocks):
            if activations.peak_bytes(modes) <= budget_bytes:
                return RecomputationChoice(modes, fits=True)
            modes[block_index] = stronger_mode
    return RecomputationChoice(modes, fits=activations.peak_bytes(modes) <= budget_bytes)
