"""Extrapolates from models of few blocks to the whole one: each step phase costs linearly in the number of blocks.

Blocks of one kind cost the same. So live bytes, exchanges and arithmetic in a phase, counted from either end (the
second block, the last but one), grow by the same amount with each further block. Between the ends they lie on a line.
The peak is the highest of these lines at full depth, which may be in another phase than in the shallow models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from strategies.tensor_inventory import MemoryKind
from trainer.planner.memory_tracker import Highest, Moment
from trainer.planner.simulate import Simulated
from trainer.planner.step_recorder import Collective

ENDS = 2
"""Blocks at either end that may do otherwise than those between, which gather ahead and are gathered ahead; an engine that
keeps more blocks gathered than these has more of them."""


@dataclass(frozen=True, slots=True)
class Extended:
    """A step of a model of `blocks` blocks, out of two simulations of fewer."""

    blocks: int
    peak: Moment
    total: int
    """Live bytes on the device at the peak."""
    kinds: dict[MemoryKind, int]
    """Of these by kind."""
    resting: dict[MemoryKind, int]
    exchanged: dict[tuple[str, int, str], tuple[int, int]]
    """By collective, ranks and type: calls, and bytes together."""
    host_reads: int
    flops: float
    host: int
    """Bytes that the engine keeps on the host."""


def shallow(blocks: int, period: int = 1, ends: int = ENDS, *, joined: bool = False) -> tuple[int, int] | None:
    """Numbers of blocks to simulate for a model of `blocks`, whose kinds of blocks repeat after `period`; None: the whole,
    which has no more blocks than the two together.

    Both leave the remainder of `blocks`, so that the last block is of the same kind. `joined`: the ends may have a block in
    common, where all blocks are of one kind and nothing reaches from one end to the other.
    """
    fewest = 2 * ends - 1 if joined and period == 1 else 2 * ends * period
    first = fewest + (blocks - fewest) % period
    return (first, first + period) if 2 * first + period <= blocks else None


def moments_at(
    low: Simulated, high: Simulated, depths: tuple[int, int], blocks: int, ends: int = ENDS
) -> dict[Moment, Highest]:
    """The moments of a model of `blocks` blocks; those of its last blocks are counted from the end, from -1."""
    line, fewer = line_of(depths, blocks), from_ends(low, depths[0], ends)
    return {
        moment: _on_lines(fewer[moment], highest, line) for moment, highest in from_ends(high, depths[1], ends).items()
    }


def _on_lines(low: Highest, high: Highest, line: Callable[[int, int], int]) -> Highest:
    """A moment on the lines of its operations, of which another one may be the highest than in the shallow models."""
    aligned = len(low.course) == len(high.course)
    course = [*map(line, low.course, high.course)] if aligned else []
    total, kinds = line(low.total, high.total), lines(low.kinds, high.kinds, line)
    if course and (more := max(course) - total) and kinds:  # kinds are known of the highest alone
        kinds[MemoryKind.activations] = kinds.get(MemoryKind.activations, 0) + more
    return Highest(max(course, default=total), 0, kinds, course)


def line_of(depths: tuple[int, int], blocks: int) -> Callable[[int, int], int]:
    """From what two depths take to what `blocks` blocks take."""
    steps = (blocks - depths[1]) / (depths[1] - depths[0])
    return lambda first, second: round(second + (second - first) * steps)


def lines(first: dict[Any, int], second: dict[Any, int], line: Callable[[int, int], int]) -> dict[Any, int]:
    """`line` of what has the same key; what either lacks is 0."""
    keys = dict.fromkeys((*second, *first))
    made = {key: line(first.get(key, 0), second.get(key, 0)) for key in keys}
    return {key: value for key, value in made.items() if value}


def extend(low: Simulated, high: Simulated, depths: tuple[int, int], blocks: int, ends: int = ENDS) -> Extended:
    """The step of a model of `blocks` blocks, from those of `depths` blocks."""
    found, line = moments_at(low, high, depths, blocks, ends), line_of(depths, blocks)
    peak, highest = max(found.items(), key=lambda item: item[1].total)
    calls, size = _exchanged(low.collectives), _exchanged(high.collectives)
    exchanged = {
        key: (line(calls[key][0], size[key][0]), line(calls[key][1], size[key][1])) for key in {**size, **calls}
    }
    return Extended(
        blocks=blocks,
        peak=peak if not isinstance(peak.place, int) or peak.place >= 0 else replace(peak, place=blocks + peak.place),
        total=highest.total,
        kinds=highest.kinds,
        resting=lines(low.resting, high.resting, line),
        exchanged=exchanged,
        host_reads=line(sum(low.host_reads.values()), sum(high.host_reads.values())),
        flops=high.flops + (high.flops - low.flops) * (blocks - depths[1]) / (depths[1] - depths[0]),
        host=line(low.host, high.host),
    )


def whole(found: Simulated, blocks: int) -> Extended:
    """What was simulated at its full depth, in the same words."""
    peak, highest = found.peak
    return Extended(
        blocks=blocks,
        peak=peak,
        total=highest.total,
        kinds=highest.kinds,
        resting=found.resting,
        exchanged=dict(_exchanged(found.collectives)),
        host_reads=sum(found.host_reads.values()),
        flops=found.flops,
        host=found.host,
    )


def at_depth(
    simulate: Callable[[int], Simulated],
    blocks: int,
    period: int = 1,
    *,
    ends: int = ENDS,
    joined: bool = False,
    exact: bool = False,
) -> Extended:
    """The step of a model of `blocks` blocks; `simulate` takes that of one with so many as it is told."""
    depths = None if exact else shallow(blocks, period, ends, joined=joined)
    if depths is None:
        return whole(simulate(blocks), blocks)
    return extend(simulate(depths[0]), simulate(depths[1]), depths, blocks, ends)


def from_ends(found: Simulated, depth: int, ends: int = ENDS) -> dict[Moment, Highest]:
    """Moments of blocks counted from the end that they are near to; those in the middle lie between."""
    out: dict[Moment, Highest] = {}
    for moment, highest in found.moments.items():
        place = moment.place
        if not isinstance(place, int):
            out[moment] = highest
            continue
        if place < ends:
            out[moment] = highest
        if place >= depth - ends:
            out[replace(moment, place=place - depth)] = highest
    return out


def near_an_end(moment: Moment, depth: int, ends: int = ENDS) -> bool:
    """Whether `from_ends` keeps the moment of a model of `depth` blocks."""
    place = moment.place
    return not isinstance(place, int) or place < ends or place >= depth - ends


def deeper(low: dict[Moment, Highest], depths: tuple[int, int], ends: int) -> dict[Moment, Highest]:
    """The moments of a model of the second depth, each with that of the first one in which a block does the same."""
    more = depths[1] - depths[0]

    def alike(moment: Moment, place: int) -> Moment:
        from_start = place < ends or (place < depths[1] - ends and moment.phase == "forward")
        return replace(moment, place=place if from_start else place - more)

    out = {moment: highest for moment, highest in low.items() if not isinstance(moment.place, int)}
    kinds = {replace(moment, place=0) for moment in low if isinstance(moment.place, int)}
    for place in range(depths[1]):
        out |= {replace(m, place=place): low[alike(m, place)] for m in kinds if alike(m, place) in low}
    return out


def _exchanged(collectives: list[Collective]) -> dict[tuple[str, int, str], tuple[int, int]]:
    calls: Counter[tuple[str, int, str]] = Counter()
    size: Counter[tuple[str, int, str]] = Counter()
    for each in collectives:
        key = each.name, len(each.ranks), each.dtype
        calls[key] += 1
        size[key] += each.bytes
    return {key: (calls[key], size[key]) for key in calls}
