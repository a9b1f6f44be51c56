"""Prints a plan, for people and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from launch.output import Column, TableRow, fold, fold_all, table
from trainer.config.run import LauncherConfig
from trainer.model.config import Quantisation
from trainer.planner.hardware import GIB, fit_of
from trainer.planner.plan import Choice, PlannedRun, Way
from trainer.planner.predicted_vs_measured import checkpoint_bytes
from trainer.planner.sweep import PlanAnswer

COLUMNS = (Column("strategy"), Column("recompute"), Column("stored"), Column("micro", is_number=True))
"""What names a way to train, in both tables of a plan."""


def text(answer: PlanAnswer, words: list[str], calibrated: tuple[str, ...] = ()) -> str:
    """What a person reads; `words` are those that were typed, `calibrated` says what was measured by which run."""
    job, form = answer.job, answer.form
    cards = f"{job.world} x {job.card.name}"
    shape = f"{job.nodes} node{'s' if job.nodes > 1 else ''} x {job.per_node} GPU{'s' if job.per_node > 1 else ''}"
    lines = [
        f"{form.parameters / 1e9:.2f} billion parameters, {form.trained / 1e9:.3f} trained; {job.precision} on {cards}",
        f"({shape}); a step is {job.global_batch} x {job.lengths.mean:,.0f} tokens; {form.layout} rows",
        "",
        *_table_of_ways(answer),
        "",
        *_best(answer, words),
        *_theirs(answer),
    ]
    if form.notes:
        lines += ["", "chosen for you:", *fold_all(form.notes)]
    if answer.refused:
        lines += ["", "left out:", *fold_all([f"{ways}: {reason}" for reason, ways in by_reason(answer).items()])]
    if calibrated:
        lines += ["", *fold_all(calibrated, indent=0)]
    rest = "; the figures above were measured" if calibrated else ""
    lines += [
        "",
        *fold(
            "Expected, not measured: the memory of tensors is simulated, what is beside them and all speeds are "
            f"reckoned{rest} (docs/planning.md).",
            0,
        ),
    ]
    return "\n".join(lines)


def _table_of_ways(answer: PlanAnswer) -> list[str]:
    columns = (
        *COLUMNS,
        Column("GiB", is_number=True),
        Column(f"of {answer.job.card.memory_gib:.1f}", is_number=True),
        Column("largest", is_number=True),
        Column("tokens/s", is_number=True),
        Column("why"),
    )
    rows = []
    for choice in answer.found:
        peak, margin = f"{choice.fit.total / GIB:.1f}", f"{choice.fit.margin / GIB:+.1f}"
        speed = f"{choice.tokens_per_s:,.0f}" if choice.fits else "-"
        cells = (*_name_of(choice), peak, margin, str(choice.largest_micro), speed, why(choice, answer))
        rows.append(TableRow(cells))
    return table(columns, rows)


def _name_of(choice: Choice) -> tuple[str, str, str, str]:
    """The cells of `COLUMNS`."""
    recompute = str(choice.way.config.strategy.activation_checkpointing)
    return choice.way.name, recompute, stored(choice.way), str(choice.micro)


def by_reason(answer: PlanAnswer) -> dict[str, str]:
    """Ways that were left out for the same reason, named together."""
    found: dict[str, list[str]] = {}
    for way, reason in answer.refused:
        mode = str(way.config.strategy.activation_checkpointing)
        found.setdefault(reason, []).append(", ".join(filter(None, (way.name, mode, stored(way)))))
    return {reason: "; ".join(dict.fromkeys(of)) for reason, of in found.items()}


def stored(way: Way) -> str:
    """What is stored otherwise than as numbers on the card: offload, the form of a quantised base, or both."""
    store = way.config.model.quantisation
    return "+".join(["offload"] * way.offload + [str(store)] * (store is not Quantisation.none))


def _theirs(answer: PlanAnswer) -> list[str]:
    """What another trainer would hold, way by way; nothing if that was not asked for."""
    rows = []
    for choice in answer.found:
        if choice.theirs is None:
            continue
        ours, theirs = f"{choice.taken.total / GIB:.1f}", f"{choice.theirs.total / GIB:.1f}"
        fits = "yes" if fit_theirs(choice, answer.job) <= answer.job.card.memory_gib else "no"
        parts = [f"{part} {size / GIB:.1f}" for part, size in choice.theirs.parts.items() if size >= 0.05 * GIB]
        peak = ": ".join(filter(None, (str(choice.theirs.at), ", ".join(parts))))
        rows.append(TableRow((*_name_of(choice), ours, theirs, fits, peak)))
    if not rows:
        return []
    numbers = (Column("ours", is_number=True), Column("theirs", is_number=True))
    return [
        "",
        *fold("as another trainer would hold it (plan.theirs); reckoned, and of no account above:", 0),
        *table((*COLUMNS, *numbers, Column("fits"), Column("theirs, at its peak")), rows),
        *fold("GiB of tensors; what is beside them counts in whether it fits.", 0),
    ]


def fit_theirs(choice: Choice, job: PlannedRun) -> float:
    """GiB of the card that the same takes as another trainer would hold it, with what is beside tensors."""
    assert choice.theirs is not None
    live = round(job.card.tensors * choice.theirs.total)
    return (fit_of(live, 0, job.card.memory_gib, job.card.allocator).total + choice.fit.exchange) / GIB


def why(choice: Choice, answer: PlanAnswer) -> str:
    """Why a way was chosen, or not."""
    best = answer.best
    if choice is best:
        return "fastest"
    if not choice.fits:
        return "too large"
    assert best is not None
    share = choice.tokens_per_s / best.tokens_per_s
    return "as fast" if share > 0.995 else f"{share:.2f} x"


def _best(answer: PlanAnswer, words: list[str]) -> list[str]:
    """The command of the best way, and where its memory and its time go."""
    best, job = answer.best, answer.job
    if best is None:
        least = answer.found[0]
        return fold(
            f"Nothing fits: the smallest, {' '.join(least.words)}, is {-least.fit.margin / GIB:.1f} GiB too much. Take more "
            "cards (launcher.nodes, launcher.gpus_per_node), a smaller data.max_length, tuning=lora, a card with more memory, "
            "or look at plan.offload=true.",
            0,
        )
    step = best.step
    return [
        *command_of(words, best, job),
        "",
        *_memory(best),
        *fold(
            f"host memory about {best.host_gib:.0f} GiB a node; a checkpoint is {checkpoint_gib(answer, best):.2f} GiB, "
            f"{checkpoint_s(answer, best):,.0f} s to write",
            2,
        ),
        *fold(
            f"a step takes {step.total_s:.2f} s: products {step.products_s:.2f}, what memory bounds {step.moves_s:.2f}, "
            f"exchange {step.exposed_s:.2f} (of {step.exchange_s:.2f}, the rest hidden), update {step.update_s:.2f}",
            2,
        ),
        *fold_all(costs(best, job), indent=0),
    ]


def _memory(best: Choice) -> list[str]:
    """The parts of the peak: tensors by kind, largest first, and what the process holds beside them."""
    columns = (Column(), Column(is_number=True), Column())
    kinds = sorted(best.taken.kinds.items(), key=lambda kind_and_size: -kind_and_size[1])
    tensors = [TableRow((str(kind), _gib(size), "")) for kind, size in kinds if size >= 0.005 * GIB]
    beside = [
        TableRow(("process", _gib(best.fit.context), "context and libraries")),
        TableRow(("allocator", _gib(best.fit.allocator), "reserved beyond what is allocated")),
        TableRow(("NCCL", _gib(best.fit.exchange), "buffers of its groups")),
    ]
    return [
        f"its peak, {_gib(best.taken.total)} of tensors, in {best.taken.peak}:",
        *table(columns, tensors, indent=2),
        "beside them, reckoned:",
        *table(columns, beside, indent=2),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def costs(best: Choice, job: PlannedRun) -> list[str]:
    """Hours and price of the budget, as far as they are known, and what would make them known."""
    epochs, rate, said = best.way.config.budget.epochs, job.card.price_per_hour, []
    if best.hours is not None:
        cost = "" if best.price is None else f": ${best.price:,.2f}"
        said.append(f"the budget takes {best.hours:,.2f} hours on {job.world} cards{cost}")
    elif epochs is not None:
        said.append(f"how long budget.epochs={epochs:g} takes depends on the data: give data.path")
    if rate is None:
        said.append(f"what it costs is not known: no price was found for {job.card.name}; give hardware.price_per_hour")
    elif best.hours is None:
        million = job.world * rate / best.tokens_per_s / 3600 * 1e6
        more = "" if epochs is not None else "; with a budget (budget.tokens=...) the price of the whole run is shown"
        said.append(f"a million tokens cost ${million:.3f}{more}")
    return said


def command_of(words: list[str], best: Choice, job: PlannedRun) -> list[str]:
    """The command for a shell, in lines of 80 columns where its words allow."""
    typed, chosen = ({word.split("=")[0] for word in of} for of in (words, best.words))
    cluster = _on_a_cluster(words, job)
    ranks = "launcher.gpus_per_node" if cluster else "launcher.processes"
    # Where nothing is said of them a run takes all GPUs there are, and under SLURM none.
    said = [] if ranks in typed else [f"{ranks}={job.per_node}"]
    out, line = [], f"shardtune {'submit' if cluster else 'train'}"
    for word in [*(word for word in words if word.split("=")[0] not in chosen), *said, *best.words]:
        quoted = shlex.quote(word)
        if len(line) + len(quoted) + 3 > 80:
            out.append(f"{line} \\")
            line = "   "
        line += f" {quoted}"
    budget, data = best.way.config.budget, best.way.config.data
    lacking = [] if any((budget.steps, budget.epochs, budget.tokens)) else ["a budget"]
    lacking += [] if data.path or data.sources else ["data.path"]
    return [*out, line, *([f"(with {' and '.join(lacking)} of your own)"] if lacking else [])]


def _on_a_cluster(words: list[str], job: PlannedRun) -> bool:
    """Whether the command is for SLURM: on several nodes, or with settings that it alone has, where nothing else is said."""
    if "launcher=local" in words or "launcher=slurm" in words:
        return "launcher=slurm" in words
    of_all = {f"launcher.{each.name}" for each in fields(LauncherConfig)}
    keys = {word.split("=")[0] for word in words if word.startswith("launcher.")}
    return job.nodes > 1 or not keys <= of_all


def checkpoint_gib(answer: PlanAnswer, best: Choice) -> float:
    """GiB of a checkpoint: of what trains, its weights in fp32 and the optimizer's state."""
    return checkpoint_bytes(answer.form.trained, str(best.way.config.optim.name)) / GIB


def checkpoint_s(answer: PlanAnswer, best: Choice) -> float:
    """Seconds to write one, at the rate that the card's file assumes of a node's disk."""
    rate = answer.job.card.disk_gb_s * 1e9 * answer.job.nodes
    return checkpoint_gib(answer, best) * GIB / rate


def as_dict(answer: PlanAnswer, words: list[str], calibrated: tuple[str, ...] = ()) -> dict[str, Any]:
    """The answer as JSON values; GiB, seconds, US dollars."""
    job, form, best = answer.job, answer.form, answer.best
    return {
        "model": {
            "parameters": form.parameters,
            "trained": form.trained,
            "blocks": form.blocks,
            "notes": list(form.notes),
        },
        "hardware": {
            "name": job.card.name,
            "memory_gib": job.card.memory_gib,
            "price_per_hour": job.card.price_per_hour,
            "sources": job.card.sources,
            "date": job.card.date,
            "allocator": job.card.allocator,
            "pace": job.card.pace,
            "tensors": job.card.tensors,
            "disk_gb_s": job.card.disk_gb_s,
            "calibrated": [said.strip() for said in calibrated],
        },
        "job": {
            "nodes": job.nodes,
            "gpus_per_node": job.per_node,
            "precision": str(job.precision),
            "global_batch": job.global_batch,
            "layout": form.layout,
            "mean_tokens": job.lengths.mean,
            "longest_tokens": int(job.lengths.longest[0]),
        },
        "typed": words,
        "best": None if best is None else list(best.words),
        "checkpoint_gib": checkpoint_gib(answer, answer.found[0]),
        "checkpoint_s": checkpoint_s(answer, answer.found[0]),
        "resting_gib": {str(kind): size / GIB for kind, size in form.resting.items()},
        "ways": [_choice(choice, answer) for choice in answer.found],
        "all": [_choice(choice, answer) for choice in answer.all],
        "left_out": [{"words": list(way.words), "why": reason} for way, reason in answer.refused],
    }


def _choice(choice: Choice, answer: PlanAnswer) -> dict[str, Any]:
    return {
        "words": list(choice.words),
        "strategy": choice.way.name,
        "fits": choice.fits,
        "why": why(choice, answer),
        "margin_gib": choice.fit.margin / GIB,
        "peak_gib": choice.taken.total / GIB,
        "peak_at": str(choice.taken.peak),
        "theirs_gib": None
        if choice.theirs is None
        else {
            "total": choice.theirs.total / GIB,
            "at": choice.theirs.at,
            "parts": {part: size / GIB for part, size in choice.theirs.parts.items()},
            "with_beside": fit_theirs(choice, answer.job),
        },
        "kinds_gib": {str(kind): size / GIB for kind, size in choice.taken.kinds.items()},
        "beside_gib": {
            "context": choice.fit.context / GIB,
            "allocator": choice.fit.allocator / GIB,
            "nccl": choice.fit.exchange / GIB,
        },
        "micro": choice.micro,
        "accumulation": choice.accumulation,
        "largest_micro": choice.largest_micro,
        "tokens_per_s": choice.tokens_per_s,
        "step_s": {
            "products": choice.step.products_s,
            "moves": choice.step.moves_s,
            "exchange": choice.step.exchange_s,
            "exposed": choice.step.exposed_s,
            "update": choice.step.update_s,
            "total": choice.step.total_s,
        },
        "host_gib": choice.host_gib,
        "hours": choice.hours,
        "price": choice.price,
    }
