"""Seconds of a step on a GPU, from its arithmetic, the bytes that it moves and exchanges, and the GPU's rates.

No kernel was timed for it. The shares of peak below are what well-shaped work commonly reaches, independent of every
measurement that plans are compared with in docs/planning.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.base import Precision
from trainer.planner.cost_model import Form
from trainer.planner.hardware import Card

PRODUCTS = 0.75
"""Share of the peak that products and attention reach."""
MOVES = 0.85
"""Share of its rate that memory reaches."""
LINKS = 0.8
"""Share of their rate that links reach with large messages."""
CALL_S = 30e-6
"""Seconds that a collective takes before its first byte, within a node; once more for each doubling of nodes."""
HOST_UPDATE_GB_S = 40.0
"""GB/s at which a host's cores go through optimizer state that lies there, all ranks of a node together. An assumption."""
_WHOLE_TRIPS = {"allreduce": 2.0}
"""How often the bytes of a collective go around its ranks; once for others."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step of one rank."""

    products_s: float
    """Matrix products and attention."""
    moves_s: float
    """Everything else in forward and backward passes, which memory bounds."""
    exchange_s: float
    """Collectives, hidden behind arithmetic or not."""
    exposed_s: float
    """Of these what nothing hides."""
    update_s: float
    """The optimizer, and what crosses to the host and back."""

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.products_s + self.moves_s + self.exposed_s + self.update_s


@dataclass(frozen=True, slots=True)
class Load:
    """A rank's micro-batches, as they are on average."""

    units: float
    """Of the form: tokens, or rows."""
    squares: float
    """Sum of the squared lengths of the sequences of one."""
    number: int
    """Of them in a step."""


def step_of(form: Form, load: Load, card: Card, precision: Precision, *, ranks_per_node: int) -> Step:
    """The seconds of a step on that card."""
    flops, moved, crossed = form.work(load.units, load.squares)
    products = load.number * flops / (card.tflops(precision) * 1e12 * PRODUCTS)
    moves = load.number * moved / (card.memory_gb_s * 1e9 * MOVES)
    inside, after = exchange_s(form, load.number, card)
    busy = products + moves
    first = inside / max(1, form.blocks * load.number)  # what comes before the first product, or after the last
    exposed = max(inside - busy, 0.0) + min(first, busy) + after
    update = form.updated / (card.memory_gb_s * 1e9 * MOVES)
    update += load.number * crossed / (card.host_gb_s * 1e9 * LINKS)
    if form.host > 2**20:
        update += 3 * form.host * ranks_per_node / (HOST_UPDATE_GB_S * 1e9)  # read, and written, and gradients read
    return Step(*(card.pace * seconds for seconds in (products, moves, inside + after, exposed, update)))


def exchange_s(form: Form, micro_batches: int, card: Card) -> tuple[float, float]:
    """Seconds of collectives (in forward and backward passes, which arithmetic may hide; in the update)."""
    inside = after = 0.0
    for (name, ranks, hosts, _dtype, when), (calls, size) in form.exchanged.items():
        if ranks == 1:
            continue
        seconds = calls * CALL_S * (1 + math.log2(hosts)) + _trips(name, ranks) * size / rate(card, ranks, hosts)
        if when == "each" and form.accumulation > 1:
            inside += seconds * (micro_batches - 1) / (form.accumulation - 1)
        elif when == "update":
            after += seconds
        else:
            inside += seconds
    return inside, after


def rate(card: Card, ranks: int, hosts: int) -> float:
    """Bytes a second at which a ring of so many ranks on so many hosts passes on what it carries."""
    if hosts == 1:
        return card.link_gb_s * 1e9 * LINKS
    share = min(1.0, ranks / hosts / card.gpus_per_node)
    inside = card.link_gb_s if ranks > hosts else math.inf
    return min(inside, card.node_gb_s * share) * 1e9 * LINKS


def _trips(name: str, ranks: int) -> float:
    around = (ranks - 1) / ranks
    return next((trips for known, trips in _WHOLE_TRIPS.items() if known in name), 1.0) * around
