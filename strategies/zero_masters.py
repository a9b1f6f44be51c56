"""This rank's fp32 masters and moments inside a DeepSpeed engine, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from strategies.compat.deepspeed import fp32_fragment
from strategies.ema import EMA_KEY, WeightAverage
from strategies.saving import FlatRange


class Fp32Masters:
    """The flat partitions that the inner optimizer steps on, and where each parameter lies in them."""

    def __init__(self, engine: Any, stage: int, dp_rank: int, trainable: list[tuple[str, Any]]) -> None:
        self.engine, self.stage, self.dp_rank, self.trainable = engine, stage, dp_rank, trainable

    def flat_groups(self) -> list[Tensor]:
        """The fp32 master partitions that the inner optimizer steps on."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if hasattr(optimizer, "bf16_groups"):  # of another class, which DeepSpeed takes for stage 1 in bf16
            return optimizer.fp32_groups_flat_partition
        return optimizer.single_partition_of_fp32_groups

    def flat_ranges(self, average: WeightAverage | None) -> Iterator[FlatRange]:
        """This rank's part of the masters, moments and average, parameter by parameter, as views."""
        names = {id(p): name for name, p in self.trainable}
        optimizer, flats = self.engine.optimizer, self.flat_groups()
        moments_by_flat = [self._moments(flat) for flat in flats]
        for moments, group_average in zip(
            moments_by_flat, average.averages if average is not None else [], strict=False
        ):
            moments[EMA_KEY] = group_average
        if self.stage == 3:
            for name, p in self.trainable:
                group, offset, numel = optimizer.grad_position[optimizer.get_param_id(p)]
                start = min(self.dp_rank * numel, p.ds_numel)
                local_numel = min(numel, p.ds_numel - start)  # the last partition is padded
                yield _flat_range(
                    name, p.ds_numel, start, (flats[group], moments_by_flat[group]), (offset, local_numel)
                )
            return
        groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
        for flat, moments, parameters in zip(flats, moments_by_flat, groups, strict=True):
            for p in parameters:
                name, mapping = names[id(p)], fp32_fragment(p)
                if mapping is None:
                    yield _flat_range(name, p.numel(), 0, (flat, moments), (0, 0))
                else:
                    inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _flat_range(name, p.numel(), outer.start, (flat, moments), (inner.start, inner.numel))

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state = self.engine.optimizer.optimizer.state.get(flat, {})
        return {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim() and v.shape == flat.shape}


def _flat_range(
    name: str, numel: int, start: int, of: tuple[Tensor, dict[str, Tensor]], span: tuple[int, int]
) -> FlatRange:
    flat, moments = of
    offset, local_numel = span
    tensors = {key: value.narrow(0, offset, local_numel) for key, value in {"weight": flat.data, **moments}.items()}
    return FlatRange(name, numel, start, tensors)
