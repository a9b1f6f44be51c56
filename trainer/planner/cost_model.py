"""The cost model of a step: memory and work, linear in blocks and in tokens, for every micro-batch at once.

One engine takes steps of two sizes, in models of two depths. Live bytes in each step phase are linear in both, so the
four corners give any depth and any size. `tests/planner/test_cost_model.py` compares them with the step itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from strategies.runtime import Runtime
from strategies.simulation import fake_tensors
from strategies.tensor_inventory import MemoryKind
from trainer.data.config import Layout
from trainer.losses.next_token import CHUNK_LOGITS
from trainer.planner.depth_extrapolation import ENDS, deeper, line_of, lines, moments_at, shallow
from trainer.planner.fake_tensors import faked
from trainer.planner.memory_tracker import Highest, Moment
from trainer.planner.simulate import Simulated, StepParts, operations, watching

Batches = list[dict[str, Any]]
Exchange = tuple[str, int, int, str, str]
"""Collective, ranks, hosts among which they are, type, and when: in `each` micro-batch but the last, the `last`, the `update`."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of a form's unit a simulated micro-batch has."""

    units: int
    """Tokens of a row without padding; else rows."""
    squares: int
    """Sum of the squared lengths of its sequences."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one rank's step takes at one size of micro-batch."""

    total: int
    """Live bytes on the device at the peak."""
    peak: Moment
    kinds: dict[MemoryKind, int]
    """Of these by kind."""


@dataclass(frozen=True, slots=True)
class Form:
    """A rank's step of `accumulation` micro-batches, at any size of them."""

    blocks: int
    accumulation: int
    """Micro-batches that were simulated; more of them hold no more."""
    rows: bool
    """Whether sizes are counted in rows, which are as long as the longest sequence; else in tokens."""
    sizes: tuple[Size, Size]
    moments: tuple[dict[Moment, Highest], dict[Moment, Highest]]
    """At either size, in the whole model."""
    bends: dict[Moment, list[tuple[int, int]]]
    """Of a moment, bytes at either size after each operation that may be its highest in larger micro-batches."""
    resting: dict[MemoryKind, int]
    """Bytes between steps."""
    flops: tuple[float, float]
    """Of one micro-batch of either size, those recomputed included."""
    moved: tuple[float, float]
    """Bytes read and written by other operations in one micro-batch of either size."""
    updated: float
    """The same in the update."""
    crossed: tuple[float, float]
    """Bytes between host and device in one micro-batch of either size."""
    exchanged: dict[Exchange, tuple[int, int]]
    """Calls, and bytes together."""
    host: int
    """Bytes that the engine keeps on the host."""
    parameters: int = 0
    """Of the whole model."""
    trained: int = 0
    """Of these, what trains."""
    vocabulary: int = 0
    """Rows of the model's vocabulary."""
    layout: str = ""
    """How documents lie in a row."""
    notes: tuple[str, ...] = ()
    """What was chosen while the model was built."""
    alone: bool = False
    """Whether the model is right for one row at a time only."""

    def at(self, units: float) -> Taken:
        """The peak of micro-batches of so many units."""
        small, large = self.moments
        totals = {
            moment: max(self._on_line(*one, units) for one in ((small[moment].total, h.total), *self.bends[moment]))
            for moment, h in large.items()
        }
        peak = max(totals, key=lambda moment: totals[moment])
        total = totals[peak]
        kinds = dict(large[peak].kinds)
        more = total - large[peak].total  # what grows with the tokens are activations: logits come in chunks
        kinds[MemoryKind.activations] = kinds.get(MemoryKind.activations, 0) + round(more)
        place = peak.place
        if isinstance(place, int) and place < 0:
            peak = replace(peak, place=self.blocks + place)
        return Taken(round(total), peak, kinds)

    def most(self, limit: float) -> float:
        """The largest units whose peak holds in `limit` bytes; 0 where even none does."""
        fits = float("inf")
        for moment, high in self.moments[1].items():
            if self._on_line(self.moments[0][moment].total, high.total, 0) > limit:
                return 0.0
            for one in ((self.moments[0][moment].total, high.total), *self.bends[moment]):
                first = self._on_line(*one, 0)
                slope = (one[1] - first) / self.sizes[1].units
                if slope > 0:
                    fits = min(fits, (limit - first) / slope)
        return fits

    def work(self, units: float, squares: float) -> tuple[float, float, float]:
        """(operations of products and attention, bytes moved by others, bytes between host and device) of a micro-batch."""
        one, two = self.sizes
        determinant = one.units * two.squares - two.units * one.squares
        if self.rows or not determinant:
            flops = self._on_line(*self.flops, units)
        else:
            linear = (self.flops[0] * two.squares - self.flops[1] * one.squares) / determinant
            square = (one.units * self.flops[1] - two.units * self.flops[0]) / determinant
            flops = linear * units + square * squares
        return flops, self._on_line(*self.moved, units), self._on_line(*self.crossed, units)

    def _on_line(self, first: float, second: float, units: float) -> float:
        one, two = self.sizes[0].units, self.sizes[1].units
        return second + (second - first) * (units - two) / (two - one)


def sizes_for(built: Any, vocabulary: int, length: int, *, straight: bool) -> tuple[bool, list[list[int]]]:
    """(whether sizes are rows, lengths of the sequences of two micro-batches to simulate) for sequences of `length` tokens.

    Both fill several of the head's chunks of logits, the second of which is made while the first still lives. Without padding
    short sequences say as much as long ones where attention's memory is `straight` in their length; else all are long.
    """
    per, chunk = built.reading.sequences_per_document, max(128, CHUNK_LOGITS // max(1, vocabulary))
    several = chunk <= 4 * length  # else no micro-batch of a few rows fills one
    if built.layout is not Layout.padding_free:
        rows = -(-2 * chunk // (per * length)) if several else 1
        return True, [[length] * per * rows, [length] * per * (rows + 1)]
    if not straight:
        number = -(-2 * chunk // (per * length)) if several else 1
        return False, [[length] * per * number, [length] * per * (number + 1)]
    if several:
        return False, [[2 * chunk // per] * per, [3 * chunk // per] * per]
    return False, [[length] * per, [2 * length] * per]


def take_sizes(
    parts: StepParts,
    sizes: list[Batches],
    runtime: Runtime,
    expected: dict[Moment, int] | None = None,
    matters: Callable[[Moment], bool] = lambda _: True,
) -> list[Simulated]:
    """`simulate` for steps of several sizes by one engine, which takes one before; kinds are told of the last alone.

    `expected`: the operations after which moments will be highest at the last size; without, those of the size before. Where
    one that `matters` is highest sooner, the step is taken twice. The model is on meta, and is used up. Raises what the engine
    raises, and ConfigError for what it refuses.
    """
    with fake_tensors(runtime.device):
        batches = faked(parts.built, sizes)
        with watching(replace(parts, batches=batches[0]), runtime) as watched:
            watched.take(batches[0][:1])
            found = [watched.again(each) for each in batches[:-1]]
            smaller = operations(found[-1][0])
            # What an update does depends on the depth alone.
            updates = {m: at for m, at in smaller.items() if m.phase in ("update", "between")}
            expected = smaller if expected is None else expected | updates
            labels = watched.recorder.labels()
            found.append(watched.again(batches[-1], expected))
            highest, _ = found[-1]
            if any(m not in highest or highest[m].operation < at for m, at in expected.items() if matters(m)):
                watched.recorder.relabel(labels)
                explained, _ = watched.again(batches[-1], operations(highest))
                for moment, each in explained.items():
                    highest[moment].kinds = each.kinds
            return [watched.report(*one) for one in found]


def form_of(
    take: Callable[[int, dict[Moment, int] | None], tuple[list[Simulated], list[Size], bool]],
    blocks: int,
    *,
    period: int | None,
    accumulation: int,
    local_world_size: int,
    ends: int = ENDS,
    joined: bool = False,
) -> Form:
    """The form of a model of `blocks` blocks; `take` simulates two sizes at the depth that it is told; see
    `take_sizes` for what it is told to expect.

    `period`: after how many blocks their kinds repeat; None simulates the whole model. `ends`, `joined`: blocks
    at either end that may do otherwise than those between, and whether they may have one in common.
    """
    depths = shallow(blocks, period, ends, joined=joined) if period else None
    low, sizes, rows = take(depths[0] if depths else blocks, None)
    # A block more changes how much lives, not where in a moment it is most.
    high = take(depths[1], operations(deeper(low[1].moments, depths, ends)))[0] if depths else low
    steps = (blocks - depths[1]) / (depths[1] - depths[0]) if depths else 0.0
    line = line_of(depths, blocks) if depths else lambda _, second: second

    def deep(of: Callable[[Simulated], float]) -> tuple[float, float]:
        """At either size, of the whole model."""
        one, two = (of(high[i]) + (of(high[i]) - of(low[i])) * steps for i in range(2))
        return one, two

    moments = [moments_at(low[i], high[i], depths, blocks, ends) if depths else high[i].moments for i in range(2)]
    first, second = (_exchanged(one[1], accumulation, local_world_size) for one in (low, high))
    calls, size = (
        lines({k: v[i] for k, v in first.items()}, {k: v[i] for k, v in second.items()}, line) for i in (0, 1)
    )
    return Form(
        blocks=blocks,
        accumulation=accumulation,
        rows=rows,
        sizes=(sizes[0], sizes[1]),
        moments=(moments[0], moments[1]),
        bends={moment: bends(moments[0][moment], highest) for moment, highest in moments[1].items()},
        resting=lines(low[1].resting, high[1].resting, line),
        flops=deep(lambda one: one.flops / accumulation),
        moved=deep(lambda one: sum(n for phase, n in one.moved.items() if phase != "update") / accumulation),
        updated=deep(lambda one: one.moved["update"])[1],
        crossed=deep(lambda one: (one.to_host + one.to_device) / accumulation),
        exchanged={key: (calls[key], size.get(key, 0)) for key in calls},
        host=line(low[1].host, high[1].host),
    )


def bends(small: Highest, large: Highest) -> list[tuple[int, int]]:
    """Bytes at two sizes after each operation that may be a moment's highest at a larger one: those that none other exceeds
    both there and in how it grows. The highest of a moment is another operation's in large micro-batches (what a block keeps for
    its backward pass grows, the gradients of its weights do not). None where the sizes do not have the same operations.
    """
    found: list[tuple[int, int]] = []
    if len(small.course) == len(large.course):
        for first, second in sorted({*zip(small.course, large.course, strict=True)}, key=lambda one: (-one[1], one[0])):
            if not found or second - first > found[-1][1] - found[-1][0]:
                found.append((first, second))
    small.course, large.course = [], []
    return found


def _exchanged(found: Simulated, accumulation: int, local_world_size: int) -> dict[Exchange, tuple[int, int]]:
    calls: Counter[Exchange] = Counter()
    size: Counter[Exchange] = Counter()
    for each in found.collectives:
        when = "last" if each.moment.micro == accumulation - 1 else "each"
        when = "update" if each.moment.phase in ("update", "between") else when
        hosts = len({rank // local_world_size for rank in each.ranks})
        key = each.name, len(each.ranks), hosts, each.dtype, when
        calls[key] += 1
        size[key] += each.bytes
    return {key: (calls[key], size[key]) for key in calls}
