"""Times a rank's own part of a forward pass: its blocks, without waiting for other ranks in collectives.

One step of each logging interval is timed. Nothing waits for it: on GPUs the times lie between events of the compute
stream, which are read with the interval's rows. All ranks end a step together, whoever held it up; only their own
times tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from strategies.compat.modules import is_compiled
from trainer.reporting.step_times import moment_on_device, seconds_between


def timed_modules(blocks: list[nn.Module], *, has_collectives_inside: bool) -> list[nn.Module]:
    """Choose the modules whose forward passes are timed to find slow ranks: a rank's own computation, without waiting for others.

    - Blocks are compiled: none, since hooks would be compiled with them.
    - No rank waits for others inside of a block: the transformer blocks themselves.
    - Ranks wait for others inside of blocks: the modules in them that have weights of their own. That is so under ZeRO-3, which
      gathers parameters there; with `has_collectives_inside`, attention, which exchanges slices for heads
      (`parallel.sequence`); and with MoE experts that are spread over ranks (`parallel.experts`), whose module waits itself and
      is left out.
    """
    if any(is_compiled(block) for block in blocks):
        return []
    modules: list[nn.Module] = []
    is_partitioned = False
    for block in blocks:
        # DeepSpeed marks the parameters that it partitions by an id.
        is_partitioned = is_partitioned or any(hasattr(parameter, "ds_id") for parameter in block.parameters())
        modules += block.modules()
    # A module of experts that are spread over ranks has an `expert_share`.
    without_spread_experts = [module for module in modules if not hasattr(module, "expert_share")]
    has_spread_experts = len(without_spread_experts) < len(modules)
    if not is_partitioned and not has_collectives_inside and not has_spread_experts:
        return blocks
    return [module for module in without_spread_experts if next(module.parameters(recurse=False), None) is not None]


@dataclass(slots=True)
class BlockTimer:
    """Times the forward passes of modules while `is_on`, by hooks."""

    device: torch.device
    is_on: bool = False
    _start_by_module: dict[nn.Module, Any] = field(default_factory=dict)
    """When each module began the pass that is under way."""
    _passes: list[tuple[Any, Any]] = field(default_factory=list)
    """(start, end) of each pass since the last `read`; moments of `moment_on_device`."""

    def watch(self, blocks: list[nn.Module], *, has_collectives_inside: bool) -> None:
        """Add hooks that time the forward passes of these blocks while `is_on`, without what strategies do around them.

        FSDP2, for example, gathers a block's parameters in hooks of its own. `has_collectives_inside`: see `timed_modules`.
        """
        for module in timed_modules(blocks, has_collectives_inside=has_collectives_inside):
            module.register_forward_pre_hook(self._begin)
            # First of all hooks, so that what strategies do after the block is not timed.
            module.register_forward_hook(self._end, prepend=True)

    def read(self) -> float:
        """Seconds that this rank's blocks computed since the last call; 0 if none were timed. Waits for the device."""
        passes = self._passes
        self._passes = []
        self._start_by_module.clear()
        return sum(seconds_between(self.device, start, end) for start, end in passes)

    def _begin(self, module: nn.Module, _: Any) -> None:
        """The hook before a forward pass."""
        if self.is_on:
            self._start_by_module[module] = moment_on_device(self.device)

    def _end(self, module: nn.Module, *_: Any) -> None:
        """The hook after a forward pass."""
        if not self.is_on:
            return
        start = self._start_by_module.pop(module, None)
        if start is not None:  # None if timing was turned on during the pass
            self._passes.append((start, moment_on_device(self.device)))
