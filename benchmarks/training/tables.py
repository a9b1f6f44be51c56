"""From what the trainers reported to rates, ratios and the tables of the results. Arithmetic and text only."""

from __future__ import annotations

from statistics import median
from typing import Any

from training.cases import BARE, BY_HAND, OURS, Group
from training.drive import Measured

Row = dict[str, Any]


def rate(stretch: dict[str, Any], clock: str) -> float:
    """Useful tokens a second of `clock` (cpu or wall), without the evaluations and checkpoints set aside."""
    return stretch["tokens"] / max(1e-9, stretch[clock] - stretch[f"aside_{clock}"])


def ratio(mine: Measured, other: Measured, clock: str) -> float:
    """Median over the rounds of how many times as fast `mine` was in the same round."""
    pairs = zip(mine.stretches, other.stretches, strict=True)
    return median(rate(a, clock) / rate(b, clock) for a, b in pairs)


def row(name: str, found: Measured, measured: dict[str, Measured], tolerance: float, clock: str) -> Row:
    """The figures of one trainer beside shardtune's and the bare loop's; None where there is nothing to compare with."""
    stretches = found.stretches
    ours, bare = measured.get(OURS.name), measured.get(BARE.name)
    tokens, slots = (sum(stretch[key] for stretch in stretches) for key in ("tokens", "slots"))
    loss = found.end["loss"]
    difference = None if bare is None else abs(loss - bare.end["loss"]) / bare.end["loss"]
    return {
        "name": name,
        "rate": median(rate(stretch, clock) for stretch in stretches),
        "wall_rate": median(rate(stretch, "wall") for stretch in stretches),
        "of_bare": None if bare is None else ratio(found, bare, clock),
        "ours_over": None if ours is None else ratio(ours, found, clock),
        "step_ms": 1e3 * median((s[clock] - s[f"aside_{clock}"]) / s["steps"] for s in stretches),
        "padding": 1 - tokens / slots,
        "peak_mb": max(stretch["peak"] for stretch in stretches),
        "start_cpu_s": found.ready["cpu"],
        "start_wall_s": found.ready["wall"],
        "start_aside_cpu_s": found.ready["aside_cpu"],
        "aside_cpu_s": sum(stretch["aside_cpu"] for stretch in stretches),
        "aside_wall_s": sum(stretch["aside_wall"] for stretch in stretches),
        "loss": loss,
        "difference": difference,
        "tolerance": tolerance,
        "agrees": difference is None or difference <= tolerance,
        "rounds": [rate(stretch, clock) for stretch in stretches],
        "version": found.end["version"],
    }


def rows(group: Group, measured: dict[str, Measured], clock: str = "cpu") -> list[Row]:
    """The group's trainers that were measured, fastest first."""
    made = [row(c.name, measured[c.name], measured, c.tolerance, clock) for c in group.cases if c.name in measured]
    return sorted(made, key=lambda one: -one["rate"])


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)


def table(made: list[Row], clock: str = "cpu", peak_flops: float | None = None, flops: float = 0.0) -> list[str]:
    """Markdown lines. A trainer whose loss does not agree gets no rates: it did other work."""
    second = "CPU-s" if clock == "cpu" else "s"
    names = ["trainer", f"useful tokens/{second}", "share of the bare loop", "shardtune is faster by"]
    names += ["tokens/s (wall)"] if clock == "cpu" else ["MFU"]
    names += ["CPU ms a step" if clock == "cpu" else "ms a step", "padding", "peak MB"]
    names += ["start CPU-s (wall s)", "final loss", "difference"]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for one in made:
        speeds = [
            f"{one['rate']:,.0f}",
            shown(one["of_bare"], ".0%"),
            shown(one["ours_over"], ".2f") + "x",
            f"{one['wall_rate']:,.0f}"
            if clock == "cpu"
            else shown(peak_flops and one["rate"] * flops / peak_flops, ".1%"),
            f"{one['step_ms']:,.0f}",
        ]
        if not one["agrees"]:
            speeds = ["loss disagrees", "-", "-", "-", "-"]
        start = one["start_cpu_s"] - one["start_aside_cpu_s"]
        cells = [one["name"], *speeds, f"{one['padding']:.0%}", f"{one['peak_mb']:,.0f}"]
        cells += [f"{start:.1f} ({one['start_wall_s']:.1f})", f"{one['loss']:.4f}"]
        cells += [f"{shown(one['difference'], '.1e')} (<= {one['tolerance']:g})"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def targets(found: dict[str, list[Row]]) -> list[str]:
    """What shardtune promises of its speed, and what was measured: one line each, for the comparisons there are."""
    lines = []
    for name, made in found.items():
        by_name = {one["name"]: one for one in made if one["agrees"]}
        ours, bare = by_name.get(OURS.name), by_name.get(BARE.name)
        others = [one for one in by_name.values() if not one["name"].startswith(("shardtune", BARE.name))]
        peers = [one for one in others if not one["name"].endswith(BY_HAND)]
        if ours is None:
            continue
        if bare is not None:
            lines.append(verdict(f"{name}: share of the bare loop's speed", ours["of_bare"], 0.90, ".0%"))
            memory = ours["peak_mb"] / bare["peak_mb"]
            lines.append(verdict(f"{name}: peak memory over the bare loop's", memory, 1.15, ".3f", most=True))
        if peers and name in ("full", "lora"):
            best = min(peers, key=lambda one: one["ours_over"])
            lines.append(verdict(f"{name}: over the best default ({best['name']})", best["ours_over"], 2.0, ".3f"))
        if peers and name == "packed":
            best = min(peers, key=lambda one: one["ours_over"])
            lines.append(verdict(f"{name}: over the best packing ({best['name']})", best["ours_over"], 1.25, ".3f"))
    return lines


def verdict(what: str, value: float, bound: float, form: str, *, most: bool = False) -> str:
    """One line: the figure, the bound, and whether it holds."""
    holds = value <= bound if most else value >= bound
    sign = "at most" if most else "at least"
    return f"- {what}: {value:{form}} ({sign} {bound:{form}}): {'holds' if holds else 'MISSED'}"
