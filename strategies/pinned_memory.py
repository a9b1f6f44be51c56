"""How much of a host's memory the inputs of recomputed blocks take while they wait there. Imports no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

GIB = 2**30
PROCESS_GIB = 3.0
"""GiB of host memory of a rank with its libraries. An allowance."""


def pinned_bytes(size: int) -> int:
    """Bytes of host memory that pinning `size` bytes takes: torch's allocator rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@dataclass(frozen=True, slots=True)
class HostTensors:
    """Tensors that a rank keeps on the host, at the moment in a step when they are most."""

    num_tensors: int = 0
    num_bytes: int = 0
    """Their bytes together, without the rounding of pinned memory."""

    def pinned_size(self, total_bytes: float | None = None) -> int:
        """Bytes of pinned memory that as many tensors of one size take. `total_bytes`: of all together; None: `num_bytes`."""
        if not self.num_tensors:
            return 0
        if total_bytes is None:
            total_bytes = self.num_bytes
        return self.num_tensors * pinned_bytes(math.ceil(total_bytes / self.num_tensors))


def expected_host_inputs(*, blocks: int, tokens: int, width: int, itemsize: int) -> HostTensors:
    """What one rank keeps on the host: an input of `tokens x width` values for each block that recomputes."""
    return HostTensors(num_tensors=blocks, num_bytes=blocks * tokens * width * itemsize)


def node_memory_bytes(on_host: HostTensors, ranks: int) -> float:
    """Bytes that `ranks` ranks take of a node's memory: what is pinned, and their processes."""
    return ranks * (on_host.pinned_size() + PROCESS_GIB * GIB)


def host_memory_bytes() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
