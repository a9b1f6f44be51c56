"""Plans which blocks recompute activations, from the run's own model, its longest micro-batch and the memory of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies import runtime as processes
from strategies.activation_plan import ActivationBytes, choose_recomputation, count_activations
from strategies.base import ActivationCheckpointing, Precision, StrategyConfig
from strategies.errors import ConfigError
from strategies.memory import estimated_activation_bytes, estimated_state_bytes
from strategies.mesh import replica_count
from strategies.pinned_memory import GIB, expected_host_inputs, host_memory_bytes, node_memory_bytes
from trainer.data.batches.cutting import RowCut
from trainer.data.config import Layout
from trainer.data.objective_spec import DataSpec
from trainer.data.store.sequences import TokenDataset
from trainer.model.architecture import width_and_num_blocks
from trainer.step import BuiltModel, ExpectedBytes

USABLE_SHARE = 0.9
"""Share of the device's memory that plans may use. The rest is for libraries, collectives and fragmentation."""


@dataclass(frozen=True, slots=True)
class LargestMicroBatch:
    """The largest forward pass that a rank makes, by which memory is estimated: a micro-batch of the longest documents."""

    train: TokenDataset
    micro_batch: int
    """Documents (packs)."""
    packed_row_tokens: int | None = None
    """Tokens of each pack; None if documents are not packed."""
    cut: RowCut | None = None
    """Which slice of its rows the rank takes; None if it takes them whole."""
    generated_tokens: int = 0
    """Tokens of the longest answer that the model writes to each document, several to one."""


def longest_micro_batch(built: BuiltModel, largest_batch: LargestMicroBatch) -> dict[str, Any]:
    """A micro-batch as large as any of the run can be: the longest documents together, every token supervised."""
    return placeholder_micro_batch(built, longest_sequence_lengths(built.data_spec, largest_batch), largest_batch.cut)


def longest_sequence_lengths(data_spec: DataSpec, largest_batch: LargestMicroBatch) -> list[int]:
    """Lengths in tokens of the sequences of a micro-batch as large as any of the run can be:

    - packed documents: each sequence is a full pack.
    - generated completions: the longest prompt with the longest completion, for every sequence.
    - else: the longest documents of the data, the longest first, since shuffling may put them into one micro-batch.
    """
    if largest_batch.packed_row_tokens is not None:
        return [largest_batch.packed_row_tokens] * largest_batch.micro_batch
    lengths = np.asarray(largest_batch.train.lengths)
    if largest_batch.generated_tokens:
        # All completions of a micro-batch may be of one prompt.
        return [int(lengths.max(initial=0)) + largest_batch.generated_tokens] * largest_batch.micro_batch
    num_sequences = min(largest_batch.micro_batch * data_spec.sequences_per_document, len(lengths))
    longest = np.partition(lengths, -num_sequences)[-num_sequences:]
    longest_first: list[int] = np.sort(longest)[::-1].tolist()
    return longest_first


def num_tokens_of_longest_micro_batch(built: BuiltModel, largest_batch: LargestMicroBatch) -> int:
    """How many tokens one rank computes with in the longest micro-batch: padding included, or those of its slice of rows."""
    lengths = longest_sequence_lengths(built.data_spec, largest_batch)
    tokens = sum(lengths)
    if built.layout is not Layout.padding_free:
        tokens = len(lengths) * max(lengths, default=0)
    if largest_batch.cut is None:
        return tokens
    start, stop = largest_batch.cut.span(tokens)
    return stop - start


def placeholder_micro_batch(built: BuiltModel, lengths: list[int], cut: RowCut | None) -> dict[str, Any]:
    """Make a micro-batch of placeholders of these lengths in tokens, on the CPU, to measure a step without real data.

    Every token that may be a target is one. Token ids, counts (`totals`) and the means that some objectives take before a
    step's first backward pass (`step_means`) are placeholders, on which no shape depends. `cut`: which slice of the rows a rank
    takes; None: whole rows.
    """
    samples = [built.data_spec.placeholder(tokens) for tokens in lengths]
    batch = built.collator(samples, cut)
    for rows in (batch, batch.get("replay", {})):
        # Without a mask, rows count as full; with one, transformers would read its values, which meta tensors do not have.
        if "attention_mask" in rows:
            rows["attention_mask"] = None
    batch["totals"] = dict.fromkeys(built.data_spec.counts(samples[0]), 1)
    batch["step_means"] = {term: torch.zeros(()) for term in built.step_module.objective.look_ahead_terms}
    return batch


def counted_activations(built: BuiltModel, largest_batch: LargestMicroBatch, precision: Precision) -> ActivationBytes:
    """Count the bytes of activations that the longest micro-batch keeps for its backward pass, on meta: allocates nothing.

    The result knows them block by block for each way of recomputation. Raises ConfigError for an encoder-decoder model, and for
    one whose forward pass reads values, which meta tensors do not have.
    """
    try:
        if built.encoder_decoder is not None:
            raise ValueError("its two sides have lengths of their own")  # becomes the ConfigError below
        return count_activations(built.step_module, longest_micro_batch(built, largest_batch), precision)
    except (RuntimeError, NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"strategy.activation_checkpointing=auto: what a {built.config.model_type} model keeps cannot be counted "
            f"({' '.join(str(error).split())[:160]}); set it to none, selective or full"
        ) from error


def activation_peak_bytes(
    built: BuiltModel, largest_batch: LargestMicroBatch, mode: ActivationCheckpointing, precision: Precision
) -> float | None:
    """Peak bytes of activations in the longest micro-batch if all blocks recompute by `mode`; None if they cannot be counted."""
    try:
        activations = counted_activations(built, largest_batch, precision)
    except ConfigError:
        return None
    return activations.peak_bytes([mode] * activations.num_blocks)


def expected_activation_bytes(
    built: BuiltModel, largest_batch: LargestMicroBatch, strategy: StrategyConfig, precision: Precision
) -> float:
    """Bytes of activations of the longest micro-batch: as counted while the step was planned, or else by a rule of thumb."""
    if built.activation_bytes is not None:
        return built.activation_bytes
    tokens = num_tokens_of_longest_micro_batch(built, largest_batch)
    width, num_blocks = width_and_num_blocks(built.base_on_meta)
    if strategy.offload_activations and strategy.activation_checkpointing is ActivationCheckpointing.full:
        num_blocks = 0  # the inputs of blocks, all that is kept of them, lie in host memory
    return estimated_activation_bytes(tokens, width, num_blocks, strategy.activation_checkpointing, precision)


def plan_checkpointing(
    built: BuiltModel,
    largest_batch: LargestMicroBatch,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
) -> None:
    """Resolve `activation_checkpointing=auto`: choose for each block what it recomputes, so that the step fits in memory.

    Sets `recomputation` in the plan of the step module (a mode for each block, which the engine reads),
    `built.activation_bytes`, and a line for the user in `built.substitutions`. Does nothing for another setting than `auto`.
    `largest_batch`: the largest micro-batch, of which activations are counted. All ranks must call; they take the modes of rank
    0, whose text for the user is the one that is shown.
    """
    if strategy.activation_checkpointing is not ActivationCheckpointing.auto:
        return
    activations = counted_activations(built, largest_batch, precision)
    if strategy.offload_activations:
        activations = activations.with_inputs_on_host()
    state_size = model_state_bytes(built, strategy, precision, runtime)
    budget_gib = strategy.memory_gib or device_memory_gib(runtime) * USABLE_SHARE
    modes, fits = choose_recomputation(activations, budget_gib * 2**30 - state_size)
    modes = processes.broadcast_object(modes, runtime)
    built.step_module.plan.recomputation = modes
    built.activation_bytes = activations.peak_bytes(modes)
    blocks_by_mode = {mode: modes.count(mode) for mode in ActivationCheckpointing}
    mode_texts = [f"{mode} in {count} of {len(modes)} blocks" for mode, count in blocks_by_mode.items() if count]
    peak_gib = (state_size + built.activation_bytes) / 2**30
    warning = "" if fits else "; more than there is: lower batch.micro or data.max_length, or shard more"
    built.substitutions["strategy.activation_checkpointing"] = (
        f"auto -> {', '.join(mode_texts) or 'none'} (estimated peak {peak_gib:.2f} of {budget_gib:.2f} GiB{warning})"
    )


def model_state_bytes(
    built: BuiltModel, strategy: StrategyConfig, precision: Precision, runtime: processes.Runtime
) -> float:
    """Estimate the bytes of parameters, gradients and optimizer state on one rank, copies in the compute type included."""
    return estimated_state_bytes(
        built.step_module,
        strategy,
        precision,
        world_size=runtime.world_size,
        num_replicas=replica_count(strategy, runtime.world_size, runtime.num_hosts),
    )


def device_memory_gib(runtime: processes.Runtime) -> float:
    """Memory of this rank's device in GiB. On a CPU, its share of the memory that the host, or the job's cgroup, has."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
    return usable_host_memory_bytes() / runtime.local_world_size / 2**30


def usable_host_memory_bytes() -> int:
    """Bytes of this host's memory that the job may use: all of it, or what its cgroup allows."""
    return min(host_memory_bytes(), processes.cgroup_memory_limit() or host_memory_bytes())


def check_host_memory_for_inputs(
    built: BuiltModel,
    largest_batch: LargestMicroBatch,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
) -> None:
    """Raise ConfigError if the inputs of blocks that `strategy.offload_activations` moves to host memory do not fit there.

    No collective. With that setting a recomputed block keeps only its input, in pinned memory of the host. On CPUs nothing is
    moved, and nothing is checked.
    """
    if not strategy.offload_activations or runtime.kind == "cpu":
        return
    # Only blocks that are recomputed keep their inputs: all of them, unless `auto` chose a mode for each.
    modes = built.step_module.plan.recomputation
    num_recomputed_blocks = len(built.step_module.shard_units())
    if modes is not None:
        num_recomputed_blocks = sum(mode is not ActivationCheckpointing.none for mode in modes)
    width, _ = width_and_num_blocks(built.base_on_meta)
    itemsize = 4 if precision is Precision.fp32 else 2
    tokens = num_tokens_of_longest_micro_batch(built, largest_batch)
    on_host = expected_host_inputs(blocks=num_recomputed_blocks, tokens=tokens, width=width, itemsize=itemsize)
    needed = node_memory_bytes(on_host, runtime.local_world_size)
    usable = usable_host_memory_bytes()
    if needed <= usable:
        return
    raise ConfigError(
        f"strategy.offload_activations=true: {num_recomputed_blocks} blocks keep {tokens:,} x {width} values each on the host: "
        f"{on_host.pinned_size() / GIB:.1f} GiB of pinned memory a rank (rounded up to a power of two a block), and "
        f"{needed / GIB:.1f} GiB for the {runtime.local_world_size} ranks of this host with their processes, which has "
        f"{usable / GIB:.1f} GiB; lower data.max_length or batch.micro, use fewer ranks a host, or set "
        "strategy.offload_activations=false"
    )


def set_expected_memory(
    built: BuiltModel,
    largest_batch: LargestMicroBatch,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
) -> None:
    """Set `built.expected_bytes`: estimates of a rank's memory, with which the run compares what it measures later.

    Must be called before the model is sharded. No collective.
    """
    built.expected_bytes = ExpectedBytes(
        model_state=model_state_bytes(built, strategy, precision, runtime),
        activations=expected_activation_bytes(built, largest_batch, strategy, precision),
    )
