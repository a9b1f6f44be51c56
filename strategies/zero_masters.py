"""Finds this rank's fp32 masters and moments inside a DeepSpeed engine, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.compat.deepspeed import fp32_fragment
from strategies.ema import EMA_KEY, WeightAverage
from strategies.saving import FlatRange


class Fp32Masters:
    """Finds the fp32 master weights of this rank, and the range of each parameter in them.

    Masters are flat tensors, each with this rank's partition of several parameters; the inner optimizer updates them.
    """

    def __init__(self, engine: Any, stage: int, rank: int, trainable: list[tuple[str, Any]]) -> None:
        self.engine = engine
        self.stage = stage
        self.rank = rank
        self.trainable = trainable

    def flat_masters(self) -> list[Tensor]:
        """The flat fp32 masters of this rank, in the order of the optimizer's groups."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if hasattr(optimizer, "bf16_groups"):  # another class, which DeepSpeed uses for stage 1 in bf16
            return optimizer.fp32_groups_flat_partition
        return optimizer.single_partition_of_fp32_groups

    def flat_ranges(self, average: WeightAverage | None) -> Iterator[FlatRange]:
        """Find this rank's part of each trained parameter in DeepSpeed's tensors, as views that a checkpoint reads or writes.

        DeepSpeed keeps fp32 master weights in flat tensors, each with this rank's elements of several parameters, one after the
        other; moments and averages lie as they do. Each range is cut out of all of them: weights, moments and, with `average`,
        the moving average.
        """
        partitions = []
        for index, flat_master in enumerate(self.flat_masters()):
            tensors = {"weight": flat_master.data, **self._moments(flat_master)}
            if average is not None:
                tensors[EMA_KEY] = average.averages[index]
            partitions.append(_FlatPartition(tensors))
        if self.stage == 3:
            yield from self._ranges_of_stage_3(partitions)
        else:
            yield from self._ranges_of_stages_1_and_2(partitions)

    def _ranges_of_stage_3(self, partitions: list[_FlatPartition]) -> Iterator[FlatRange]:
        """Cut this rank's part of each parameter out of its flat tensors, as ZeRO stage 3 lays them out.

        Every rank has a part of each parameter. All parts have one length: the last ones may end in padding. `partitions`: this
        rank's flat tensors (master weights, moments), by group of the optimizer.
        """
        optimizer = self.engine.optimizer
        for name, parameter in self.trainable:
            # Where the parameter's part lies: index of the flat master, offset in it, and length with padding.
            group_index, offset, padded_length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            full_numel = parameter.ds_numel
            start = min(self.rank * padded_length, full_numel)
            num_own_elements = min(padded_length, full_numel - start)
            tensors = partitions[group_index].narrow(offset, num_own_elements)
            yield FlatRange(name, full_numel, start, tensors)

    def _ranges_of_stages_1_and_2(self, partitions: list[_FlatPartition]) -> Iterator[FlatRange]:
        """Cut this rank's part of each parameter out of its flat tensors, as ZeRO stages 1 and 2 lay them out.

        The parameters of an optimizer group are concatenated, and the flat tensor is divided equally among the ranks. So a rank
        has all of a parameter, a part of it, or nothing, for which the range is empty. `partitions`: this rank's flat tensors
        (master weights, moments), by group of the optimizer.
        """
        optimizer = self.engine.optimizer
        name_by_id = {id(parameter): name for name, parameter in self.trainable}
        parameter_groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
        for partition, parameters in zip(partitions, parameter_groups, strict=True):
            for parameter in parameters:
                name = name_by_id[id(parameter)]
                fragment = fp32_fragment(parameter)  # where this rank's elements lie, as DeepSpeed has it
                if fragment is None:  # no part of it is on this rank
                    yield FlatRange(name, parameter.numel(), start=0, tensors_by_key=partition.narrow(0, 0))
                    continue
                range_in_flat = fragment.hp_fragment_address  # high precision: in the flat fp32 master
                # Low precision: in the flattened bf16 or fp16 parameter.
                range_in_parameter = fragment.lp_fragment_address
                tensors = partition.narrow(range_in_flat.start, range_in_flat.numel)
                yield FlatRange(name, parameter.numel(), range_in_parameter.start, tensors)

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The inner optimizer's state of a flat tensor that has a value for each element, by its key (`exp_avg`, ...)."""
        moments = {}
        for key, entry in self.engine.optimizer.optimizer.state.get(flat, {}).items():
            if torch.is_tensor(entry) and entry.dim() and entry.shape == flat.shape:
                moments[key] = entry
        return moments


@dataclass(slots=True)
class _FlatPartition:
    """One flat partition: the master weights, their moments and their average, all of one length."""

    tensors: dict[str, Tensor]

    def narrow(self, offset: int, numel: int) -> dict[str, Tensor]:
        """Views of `numel` elements from `offset` on."""
        return {key: tensor.narrow(0, offset, numel) for key, tensor in self.tensors.items()}
