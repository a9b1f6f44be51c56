"""`plan.html`: a plan in one file that needs no network: what to run, the memory of each choice beside the card's, speeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from launch.plan.answer import (
    budget_and_price_lines,
    cards_text,
    checkpoint_gib,
    checkpoint_s,
    enough_cards_text,
    format_dollars,
    memory_savings_text,
    refused_variants_by_reason,
    verdict_on_choice,
)
from launch.plan.expert_notes import expert_parallel_notes
from launch.plan.planned_command import planned_command
from strategies.tensor_inventory import MemoryKind
from trainer.pages.numbers import format_bytes, format_duration, format_number
from trainer.pages.pieces import Callout, PageCard, PageCell, PageColumn, PageTable
from trainer.pages.render import render
from trainer.planner.hardware import GIB
from trainer.planner.plan import PlannedChoice, PlannedJob
from trainer.planner.round_time import RoundTime
from trainer.planner.sweep import PlanAnswer

PAGE_FILE = "plan.html"
MAX_DRAWN_BARS = 40
"""Choices whose memory is drawn; the table has all."""
MAX_BAR_IN_CARD_MEMORIES = 1.6
"""What a bar may be at most, as a multiple of the card's memory. Longer ones are cut, and say so."""
LABEL_BY_MEMORY_PART: dict[str, str] = {
    MemoryKind.parameters: "parameters",
    MemoryKind.gathered: "gathered parameters",
    MemoryKind.gradients: "gradients",
    MemoryKind.optimizer: "optimizer",
    MemoryKind.activations: "activations",
    MemoryKind.logits: "logits",
    MemoryKind.communication: "communication",
    MemoryKind.other: "other tensors",
    "process": "process, allocator, NCCL",
}
"""Parts of a card's memory from left to right, with their names on the page."""
MIN_SHOWN_GIB = 0.005
"""Smaller parts are left out: they would be shown as 0.00."""


class BarSegment(NamedTuple):
    """A part of a memory bar. The template unpacks it in this order."""

    colour_number: int
    label: str
    size_gib: float
    width_percent: float


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """The memory of one choice (a variant of the run with a micro-batch), as a bar of parts beside the memory of the card."""

    name: str
    segments: list[BarSegment]
    """The parts of its memory, from left to right."""
    total_gib: float
    is_cut: bool
    fits: bool
    verdict: str


def plan_page(answer: PlanAnswer, overrides: list[str], calibration_lines: tuple[str, ...] = ()) -> str:
    """Write the page of a plan (plan.html) as HTML, for `shardtune plan to=<directory>`.

    A plan lists choices: a variant of the run (strategy, recomputation, ...) with a micro-batch. The page calls them
    options. `overrides`: those of the command line. `calibration_lines`: what the run of `from=` has measured; empty without one.
    """
    bars = memory_bars(answer)
    refused = [(names, reason) for reason, names in refused_variants_by_reason(answer).items()]
    return render(
        "launch.plan",
        "page.html.j2",
        about=_planned_run_text(answer),
        verdict=_best_choice_callout(answer, overrides),
        cards=_page_cards(answer),
        notes=_note_callouts(answer),
        bars=bars,
        legend=_colour_legend(bars),
        left_out_bars=len(answer.best_choices) - len(bars),
        card_gib=answer.planned_run.card.memory_gib,
        card_position=100 / _axis_end_in_card_memories(answer),  # percent of the axis, where the card's memory ends
        options=_choices_table(answer),
        refused=refused,
        facts=_plan_inputs(answer, overrides),
        calibrated=[line.strip() for line in calibration_lines],
    )


def _colour_legend(bars: list[MemoryBar]) -> list[tuple[int, str]]:
    """The legend of the memory bars: (number of the colour, label) of each part that any bar has: [(0, "parameters"), ...]."""
    label_by_colour = {}
    for bar in bars:
        for segment in bar.segments:
            label_by_colour[segment.colour_number] = segment.label
    return sorted(label_by_colour.items())


def _planned_run_text(answer: PlanAnswer) -> str:
    """The line under the title of a plan's page: "7.00 billion parameters, 7.000 trained, bf16, on 8 x NVIDIA L4 ..."."""
    job = answer.planned_run
    cost_model = answer.cost_model
    nodes = f"{job.num_nodes} node{'s' if job.num_nodes > 1 else ''}"
    return (
        f"{cost_model.num_parameters / 1e9:.2f} billion parameters, {cost_model.num_trained_parameters / 1e9:.3f} trained, "
        f"{job.precision}, on "
        f"{job.world_size} x {job.card.name} ({nodes}); a step is {format_number(job.global_batch)} x "
        f"{format_number(round(job.document_lengths.mean))} tokens"
    )


def choice_name(choice: PlannedChoice) -> str:
    """The name of a choice: "fsdp2, full recomputation, rows/2+offload, micro-batch 8"."""
    mode = str(choice.variant.config.strategy.activation_checkpointing)
    parts = [choice.variant.name, "nothing recomputed" if mode == "none" else f"{mode} recomputation"]
    savings = memory_savings_text(choice.variant)
    parts += [savings] if savings else []
    return ", ".join([*parts, f"micro-batch {choice.micro_batch}"])


def _best_choice_callout(answer: PlanAnswer, overrides: list[str]) -> Callout:
    """Tell the reader first what to do: the command of the fastest option that fits, or that nothing fits and what would help.

    `overrides`: those of the command line, with which the command begins.
    """
    best = answer.fastest_fitting_choice
    if best is None:
        smallest = answer.best_choices[0]  # if nothing fits, the choice that lacks least memory comes first
        excess = f"{format_number(-smallest.memory_fit.margin_bytes / GIB, 3)} GiB more than the card has"
        advice = "Take more cards, a smaller data.max_length, tuning=lora, or a card with more memory. "
        advice = f"{advice}{enough_cards_text(answer)}".rstrip()
        if not smallest.fits_host and smallest.memory_fit.margin_bytes >= 0:
            needed_gib = format_number(smallest.needed_host_gib, 3)
            excess = f"{needed_gib} GiB of a node's memory, which has {format_number(smallest.node_memory_gib, 3)}"
            advice = "Take fewer ranks a node, a smaller data.max_length, or leave strategy.offload_activations out."
        return Callout("bad", "Nothing fits", f"The smallest option, {choice_name(smallest)}, takes {excess}. {advice}")
    command = planned_command(overrides, best, answer.planned_run)
    text = f"The fastest option that fits, {format_number(round(best.tokens_per_s))} tokens a second of all cards"
    text = f"{text} ({command.user_must_add})." if command.user_must_add else f"{text}."
    return Callout("good", f"Take {choice_name(best)}", text, ["\n".join(command.lines)])


def _page_cards(answer: PlanAnswer) -> list[PageCard]:
    """The boxes at the top of the page: memory, speed, time and price of the fastest option that fits.

    If none fits, those of the one that lacks least memory, without speed and time of a step. A `PageCard` is a box on the
    page; `job.card` is the GPU.
    """
    job = answer.planned_run
    choice = answer.fastest_fitting_choice or answer.best_choices[0]
    cards = [_memory_card(choice, job)]
    if answer.fastest_fitting_choice is not None:
        speed_of_one_gpu = f"{format_number(round(choice.tokens_per_s / job.world_size))} each card"
        cards.append(PageCard("Speed", format_number(round(choice.tokens_per_s)), speed_of_one_gpu, unit="tokens/s"))
        cards.append(PageCard("A step", format_duration(choice.step_time.total_s), _largest_step_part_text(choice)))
    if choice.round_time is not None:
        cards.append(_round_card(choice.round_time))
    if choice.budget_hours is not None:
        price = "price not known"
        if choice.budget_dollars is not None:
            price = f"{format_dollars(choice.budget_dollars)} for {cards_text(job)}"
        cards.append(PageCard("The budget", format_duration(3600 * choice.budget_hours), price))
    checkpoint = f"{format_duration(checkpoint_s(answer, choice))} to write"
    cards.append(PageCard("A checkpoint", format_bytes(checkpoint_gib(answer, choice) * GIB), checkpoint))
    cards.append(PageCard("Host memory", format_number(choice.needed_host_gib, 3), "of a node, about", unit="GiB"))
    return cards


def _memory_card(choice: PlannedChoice, job: PlannedJob) -> PageCard:
    """The box on the memory that an option needs of a GPU, and how much is left ("3.1 GiB left on each card") or lacking."""
    left_gib = choice.memory_fit.margin_bytes / GIB
    left_text = f"{format_number(left_gib, 3)} GiB left on each card"
    if left_gib < 0:
        left_text = f"{format_number(-left_gib, 3)} GiB too much"
    needed = format_number(choice.memory_fit.needed_bytes / GIB, 3)
    unit = f"of {format_number(job.card.memory_gib, 3)} GiB"
    return PageCard("Memory of a card", needed, left_text, "good" if left_gib >= 0 else "bad", unit=unit)


def _round_card(round_time: RoundTime) -> PageCard:
    """The box on the time of a round of reinforcement learning: the model writes answers, rewards score them, it trains on them.

    `scoring_s` of the round is None if nothing has measured how long the user's rewards take.
    """
    parts = f"writing {format_duration(round_time.generation_s)}, training {format_duration(round_time.training_s)}"
    rewards = "; rewards not known"
    if round_time.scoring_s is not None:
        rewards = f", rewards {format_duration(round_time.scoring_s)}"
    return PageCard("A round", format_duration(round_time.total_s), f"at most, planned: {parts}{rewards}")


def _largest_step_part_text(choice: PlannedChoice) -> str:
    """What a planned step spends most of its time on, as the small print of a box: "most: matrix products, 72%"."""
    step = choice.step_time
    parts = {
        "matrix products": step.matmul_s,
        "memory-bound operations": step.memory_bound_s,
        "waiting for communication": step.exposed_communication_s,
        "the optimizer": step.optimizer_s,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"most: {name}, {parts[name] / max(step.total_s, 1e-12):.0%}"  # a step may be planned to take 0 s


def _note_callouts(answer: PlanAnswer) -> list[Callout]:
    """What the reader of a plan's page should know beside the numbers: a note on each of the following that applies.

    - What the plan chose for settings that the user left open (`cost_model.notes`).
    - What the run costs, if its hours are not known; otherwise a box shows the price.
    - How experts are distributed over ranks, for a mixture of experts.
    """
    notes = []
    if answer.cost_model.notes:
        notes.append(Callout("note", "Chosen for you", "; ".join(answer.cost_model.notes)))
    best = answer.fastest_fitting_choice
    if best is not None and best.budget_hours is None:  # without hours there is no price, and no card on the budget
        lines = budget_and_price_lines(best, answer.planned_run)
        notes.append(Callout("note", "What the run costs", "; ".join(lines)))
    expert_notes = expert_parallel_notes(answer)
    if expert_notes:
        notes.append(Callout("note", "Experts over ranks", "; ".join(expert_notes)))
    return notes


def gib_by_memory_part(choice: PlannedChoice) -> dict[str, float]:
    """Split the memory that an option needs of a GPU into parts, for the bars and the table of a plan's page.

    {"parameters": 12.5, ..., "process": 1.8} in GiB, under the keys of `LABEL_BY_MEMORY_PART`; the sum is what the option
    needs. Kinds of tensors are those at the simulated peak of a step; "process" is what CUDA, the allocator and NCCL take
    beside them.
    """
    # A run of `from=` may have measured more tensors than were simulated: each kind then gets its share of the difference.
    measured_over_simulated = choice.memory_fit.live_bytes / max(choice.memory_peak.total_bytes, 1)
    gib_by_part = {
        str(kind): measured_over_simulated * size / GIB for kind, size in choice.memory_peak.bytes_by_kind.items()
    }
    gib_by_part["process"] = (
        choice.memory_fit.process_bytes + choice.memory_fit.allocator_bytes + choice.memory_fit.nccl_bytes
    ) / GIB
    return gib_by_part


def _axis_end_in_card_memories(answer: PlanAnswer) -> float:
    """How long the common axis of all memory bars is, as a multiple of the GPU's memory.

    At least 1.1, so that the end of the memory is seen; at most `MAX_BAR_IN_CARD_MEMORIES`, so that an option far too large
    does not make the others tiny.
    """
    largest = max(choice.memory_fit.needed_bytes for choice in answer.best_choices[:MAX_DRAWN_BARS]) / GIB
    return min(MAX_BAR_IN_CARD_MEMORIES, max(1.1, 1.04 * largest / answer.planned_run.card.memory_gib))


def _bar_segments(gib_by_part: dict[str, float], axis_gib: float) -> list[BarSegment]:
    """Lay the parts of an option's memory side by side on an axis of `axis_gib`; what is beyond its end is cut off.

    `gib_by_part`: under the keys of `LABEL_BY_MEMORY_PART`, which also gives the order and the colours.
    """
    segments = []
    position_gib = 0.0
    for colour_number, (part, label) in enumerate(LABEL_BY_MEMORY_PART.items()):
        size_gib = gib_by_part.get(str(part), 0.0)
        if size_gib < MIN_SHOWN_GIB:
            continue
        end_gib = min(position_gib + size_gib, axis_gib)
        width_percent = 100 * (end_gib - position_gib) / axis_gib
        segments.append(BarSegment(colour_number, label, size_gib, width_percent))
        position_gib = end_gib
    return segments


def memory_bars(answer: PlanAnswer) -> list[MemoryBar]:
    """The picture of what fits: for each of the first options a bar of the parts of its memory, on an axis with the GPU's memory.

    In the order of the answer: the fastest that fits first. A bar longer than the axis is cut at its end (`is_cut`). Parts
    too small to see are not drawn, but count in the total.
    """
    axis_gib = _axis_end_in_card_memories(answer) * answer.planned_run.card.memory_gib
    bars = []
    for choice in answer.best_choices[:MAX_DRAWN_BARS]:
        total_gib = choice.memory_fit.needed_bytes / GIB
        bars.append(
            MemoryBar(
                name=choice_name(choice),
                segments=_bar_segments(gib_by_memory_part(choice), axis_gib),
                total_gib=total_gib,
                is_cut=total_gib > axis_gib,
                fits=choice.fits,
                verdict=verdict_on_choice(choice, answer),
            )
        )
    return bars


def _choices_table(answer: PlanAnswer) -> PageTable:
    """The table of all options, each with its best micro-batch: speed, settings, memory, and what the memory consists of.

    A part of memory has a column if it is large enough to show in some option.
    """
    gib_by_part_of_choices = [gib_by_memory_part(choice) for choice in answer.best_choices]
    shown_parts = []
    for part in LABEL_BY_MEMORY_PART:
        largest_gib = max(gib_by_part.get(str(part), 0.0) for gib_by_part in gib_by_part_of_choices)
        if largest_gib >= MIN_SHOWN_GIB:
            shown_parts.append(str(part))
    columns = [
        PageColumn("strategy"),
        PageColumn("speed"),
        PageColumn("tokens/s", best="largest"),
        PageColumn("recomputed"),
        PageColumn("stored"),
        PageColumn("micro-batch"),
        PageColumn("needs", "memory of a card, GiB", best="smallest"),
        PageColumn("left", "memory of a card, GiB"),
        *(PageColumn(LABEL_BY_MEMORY_PART[part], "of that, GiB") for part in shown_parts),
    ]
    rows = []
    for choice, gib_by_part in zip(answer.best_choices, gib_by_part_of_choices, strict=True):
        part_cells = []
        for part in shown_parts:
            # Of a micro-batch below the simulated ones, what it lacks is taken from activations alone: they may fall below 0.
            size_gib = max(gib_by_part.get(part, 0.0), 0.0)
            part_cells.append(PageCell(f"{size_gib:.2f}", size_gib))
        rows.append([*_choice_cells(choice, answer), *part_cells])
    return PageTable(columns, rows, "Every option with its best micro-batch.")


def _choice_cells(choice: PlannedChoice, answer: PlanAnswer) -> list[PageCell]:
    """The cells of an option in `_choices_table`, up to the parts of its memory.

    A cell has the text and the value that the column is sorted by. An option that does not fit has a dash as its speed,
    without such a value, so that it is sorted last.
    """
    needed_gib = choice.memory_fit.needed_bytes / GIB
    left_gib = choice.memory_fit.margin_bytes / GIB
    speed = PageCell("\N{EN DASH}")
    if choice.fits:
        speed = PageCell(format_number(round(choice.tokens_per_s)), choice.tokens_per_s)
    recomputation = str(choice.variant.config.strategy.activation_checkpointing)
    storage = memory_savings_text(choice.variant) or "whole"
    # The verdict (`too large`) stands beside the name, where a phone shows it without scrolling.
    verdict = verdict_on_choice(choice, answer)
    return [
        PageCell(choice.variant.name, choice.variant.name),
        PageCell(verdict, verdict, tone="" if choice.fits else "bad"),
        speed,
        PageCell(recomputation, recomputation),
        PageCell(storage, storage),
        PageCell(str(choice.micro_batch), choice.micro_batch, note=f"largest {choice.largest_micro_batch}"),
        PageCell(f"{needed_gib:.1f}", needed_gib),
        PageCell(f"{left_gib:+.1f}", left_gib),
    ]


def _plan_inputs(answer: PlanAnswer, overrides: list[str]) -> list[tuple[str, str]]:
    """What the plan was made from, for the folded section at the end of its page: [("typed", "tuning=lora"), ("rows", "packed")].

    Pairs of a label and a text; those without a text are left out.
    """
    job: PlannedJob = answer.planned_run
    card = job.card
    price = "not known" if card.price_per_hour is None else f"${card.price_per_hour:,.2f} an hour"
    facts = [
        ("typed", " ".join(overrides)),
        ("card", f"{card.name}, {format_number(card.memory_gib, 3)} GiB, {price}"),
        ("figures of the card from", ", ".join([*card.sources, card.date])),
        (
            "documents",
            f"{format_number(round(job.document_lengths.mean))} tokens on average, "
            f"{format_number(int(job.document_lengths.longest[0]))} the longest",  # lengths are sorted, the longest first
        ),
        ("rows", answer.cost_model.layout),
    ]
    return [(name, fact) for name, fact in facts if fact]
