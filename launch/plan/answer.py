"""Prints a plan as text and as JSON: every choice, the best one's command, memory, time and price.

A choice is a variant of the run (strategy, recomputation, offloading, storage of the base) with a micro-batch. What is
printed calls it an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.cluster.long_steps import long_step_notes
from launch.output import TableColumn, TableRow, format_table, wrap_sentences, wrap_text
from launch.plan.expert_notes import expert_parallel_notes
from launch.plan.planned_command import planned_command_lines
from launch.plan.round_lines import round_as_json, round_lines
from trainer.model.config import Quantisation
from trainer.planner.hardware import GIB, device_memory_fit
from trainer.planner.plan import PlannedChoice, PlannedJob
from trainer.planner.predicted_vs_measured import checkpoint_bytes
from trainer.planner.speed import StepTime
from trainer.planner.sweep import PlanAnswer
from trainer.planner.variants import RunVariant

CHOICE_NAME_COLUMNS = (
    TableColumn("strategy"),
    TableColumn("recompute"),
    TableColumn("stored"),
    TableColumn("micro", is_number=True),
)
"""Columns that name a choice, in both tables of a plan; `_choice_name_cells` fills them."""


def plan_text(answer: PlanAnswer, overrides: list[str], calibration_lines: tuple[str, ...] = ()) -> str:
    """Write what `shardtune plan` prints: the run, a table of the options, the best one in detail, and what was left out.

    `overrides`: the settings on the command line. `calibration_lines`: what a run of `from=` has measured; empty without one.
    """
    job = answer.planned_run
    cost_model = answer.cost_model
    cards = f"{job.world_size} x {job.card.name}"
    nodes = f"{job.num_nodes} {_plural('node', job.num_nodes)}"
    gpus = f"{job.ranks_per_node} {_plural('GPU', job.ranks_per_node)}"
    billions = cost_model.num_parameters / 1e9
    trained_billions = cost_model.num_trained_parameters / 1e9
    lines = [
        f"{billions:.2f} billion parameters, {trained_billions:.3f} trained; {job.precision} on {cards}",
        f"({nodes} x {gpus}); a step is {job.global_batch} x {job.document_lengths.mean:,.0f} tokens; {cost_model.layout} rows",
        "",
        *_choices_table(answer),
        "",
        *_best_choice_lines(answer, overrides),
        *_peer_memory_table(answer),
    ]
    if cost_model.notes:
        lines += ["", "chosen for you:", *wrap_sentences(cost_model.notes)]
    if answer.refused_variants:
        refused_lines = [f"{names}: {reason}" for reason, names in refused_variants_by_reason(answer).items()]
        lines += ["", "left out:", *wrap_sentences(refused_lines)]
    measured_clause = ""
    if calibration_lines:
        lines += ["", *wrap_sentences(calibration_lines, indent=0)]
        measured_clause = "; the figures above were measured"
    closing_sentence = (
        "Expected, not measured: the memory of tensors is simulated, what is beside them and all speeds are "
        f"estimated{measured_clause} (docs/planning.md)."
    )
    return "\n".join([*lines, "", *wrap_text(closing_sentence, indent=0)])


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _choices_table(answer: PlanAnswer) -> list[str]:
    """The table of a plan, with a row for each variant of the run (strategy, recomputation, storage) and its best micro-batch.

    Its columns: what names the option, GiB that it needs, GiB left on the GPU, the largest micro-batch that fits, the speed,
    and the verdict (`fastest`, `0.85 x`, `too large`).
    """
    columns = (
        *CHOICE_NAME_COLUMNS,
        TableColumn("GiB", is_number=True),
        TableColumn(f"of {answer.planned_run.card.memory_gib:.1f}", is_number=True),
        TableColumn("largest", is_number=True),
        TableColumn("tokens/s", is_number=True),
        TableColumn("why"),
    )
    rows = []
    for choice in answer.best_choices:
        cells = (
            *_choice_name_cells(choice),
            f"{choice.memory_fit.needed_bytes / GIB:.1f}",
            f"{choice.memory_fit.margin_bytes / GIB:+.1f}",
            str(choice.largest_micro_batch),
            f"{choice.tokens_per_s:,.0f}" if choice.fits else "-",
            verdict_on_choice(choice, answer),
        )
        rows.append(TableRow(cells))
    return format_table(columns, rows)


def _choice_name_cells(choice: PlannedChoice) -> tuple[str, str, str, str]:
    """The cells of a choice in the columns `CHOICE_NAME_COLUMNS`: strategy, recomputation, storage, micro-batch."""
    recompute = str(choice.variant.config.strategy.activation_checkpointing)
    return choice.variant.name, recompute, memory_savings_text(choice.variant), str(choice.micro_batch)


def refused_variants_by_reason(answer: PlanAnswer) -> dict[str, str]:
    """Group the variants that a plan left out by the reason, so that each reason is printed once.

    {"strategy.replicate=2: must divide the number of ranks, 1; choose ...": "hsdp, none; hsdp, full"}
    """
    names_by_reason: dict[str, list[str]] = {}
    for variant, reason in answer.refused_variants:
        mode = str(variant.config.strategy.activation_checkpointing)
        parts = [part for part in (variant.name, mode, memory_savings_text(variant)) if part]
        names_by_reason.setdefault(reason, []).append(", ".join(parts))
    return {reason: "; ".join(dict.fromkeys(names)) for reason, names in names_by_reason.items()}


def memory_savings_text(variant: RunVariant) -> str:
    """How a variant of a run saves memory, for the column `stored` of a plan: `rows/2+offload+nf4`; empty if it saves none.

    `experts/N`: the experts of a layer over N ranks. `rows/N`: each row over N ranks (sequence parallelism). `tiles`: MLPs
    by tiles of tokens. `inputs`: inputs of recomputed blocks in host memory. `offload`: states in host memory. Last, how a
    frozen base is quantised.
    """
    parts = []
    config = variant.config
    if config.parallel.experts > 1:
        parts.append(f"experts/{config.parallel.experts}")
    if config.parallel.sequence > 1:
        parts.append(f"rows/{config.parallel.sequence}")
    if config.strategy.mlp_tokens is not None:
        parts.append("tiles")
    if config.strategy.offload_activations:
        parts.append("inputs")
    if variant.offloads_to_host:
        parts.append("offload")
    quantisation = variant.config.model.quantisation
    if quantisation is not Quantisation.none:
        parts.append(str(quantisation))
    return "+".join(parts)


def _peer_memory_table(answer: PlanAnswer) -> list[str]:
    """Show what the same step would take in another trainer, the peer ("theirs"), for each option; empty without `plan.theirs`.

    Its columns: GiB of tensors of this trainer (`ours`) and of the peer (`theirs`), whether the peer would fit on the card
    with all that its process holds, and the peer's peak with its parts. It only informs: no choice or verdict depends on it.
    """
    min_shown_bytes = 0.05 * GIB  # less would be shown as 0.0
    rows = []
    for choice in answer.best_choices:
        peer = choice.peer_memory
        if peer is None:  # plan.theirs was not asked for
            continue
        our_gib = f"{choice.memory_peak.total_bytes / GIB:.1f}"
        peer_gib = f"{peer.total / GIB:.1f}"
        peer_fits = "yes" if peer_memory_gib(choice, answer.planned_run) <= answer.planned_run.card.memory_gib else "no"
        parts = [f"{part} {size / GIB:.1f}" for part, size in peer.parts.items() if size >= min_shown_bytes]
        peer_peak = f"{peer.phase}: {', '.join(parts)}" if parts else peer.phase
        rows.append(TableRow((*_choice_name_cells(choice), our_gib, peer_gib, peer_fits, peer_peak)))
    if not rows:
        return []
    gib_columns = (TableColumn("ours", is_number=True), TableColumn("theirs", is_number=True))
    return [
        "",
        *wrap_text("as another trainer would hold it (plan.theirs); estimated, and of no account above:", indent=0),
        *format_table(
            (*CHOICE_NAME_COLUMNS, *gib_columns, TableColumn("fits"), TableColumn("theirs, at its peak")), rows
        ),
        *wrap_text("GiB of tensors; what is beside them counts in whether it fits.", indent=0),
    ]


def peer_memory_gib(choice: PlannedChoice, job: PlannedJob) -> float:
    """GiB of a GPU that an option would take in another trainer (the peer, `plan.theirs`), to see whether it would fit there.

    That is the peer's tensors and what a process holds beside them: context, fragmentation, buffers of NCCL.
    """
    assert choice.peer_memory is not None  # callers show only options for which it was estimated
    tensor_bytes = round(job.card.tensors * choice.peer_memory.total)  # `tensors`: measured over simulated, usually 1
    peer_fit = device_memory_fit(
        tensor_bytes, num_groups=0, memory_gib=job.card.memory_gib, allocator_overhead=job.card.allocator
    )
    return (peer_fit.needed_bytes + choice.memory_fit.nccl_bytes) / GIB


def verdict_on_choice(choice: PlannedChoice, answer: PlanAnswer) -> str:
    """What a plan says of an option: `fastest` of those that fit, `as fast` as that, `0.85 x` its speed, or `too large`."""
    best = answer.fastest_fitting_choice
    if choice is best:
        return "fastest"
    if not choice.fits:
        return "too large"
    assert best is not None  # some choice fits: this one
    relative_speed = choice.tokens_per_s / best.tokens_per_s
    # `as fast` from where two digits would show 1.00 x.
    return "as fast" if relative_speed > 0.995 else f"{relative_speed:.2f} x"


def _best_choice_lines(answer: PlanAnswer, overrides: list[str]) -> list[str]:
    """The part of a plan on the fastest option that fits: the command to train so, and where its memory, time and money go.

    If nothing fits: what lacks, and what would help.
    """
    best, job = answer.fastest_fitting_choice, answer.planned_run
    if best is None:
        return [*_nothing_fits_lines(answer), *wrap_sentences(expert_parallel_notes(answer), indent=0)]
    return [
        *planned_command_lines(overrides, best, job),
        "",
        *_memory_tables(best),
        *wrap_text(
            f"host memory about {best.needed_host_gib:.0f} GiB a node; a checkpoint is {checkpoint_gib(answer, best):.2f} GiB, "
            f"{checkpoint_s(answer, best):,.0f} s to write",
            indent=2,
        ),
        *_step_time_lines(best.step_time),
        *_round_lines(best, job),
        *wrap_sentences(budget_and_price_lines(best, job), indent=0),
        *wrap_sentences(expert_parallel_notes(answer), indent=0),
        *wrap_sentences(_long_step_notes(answer, best), indent=0),
    ]


def _step_time_lines(step_time: StepTime) -> list[str]:
    """Lines on the seconds of a step, and what they are spent on."""
    return wrap_text(
        f"a step takes {step_time.total_s:.2f} s: matrix products {step_time.matmul_s:.2f}, "
        f"memory-bound operations {step_time.memory_bound_s:.2f}, "
        f"communication {step_time.exposed_communication_s:.2f} (of {step_time.communication_s:.2f}, the rest overlaps), "
        f"optimizer {step_time.optimizer_s:.2f}",
        indent=2,
    )


def _round_lines(best: PlannedChoice, job: PlannedJob) -> list[str]:
    """Lines on the seconds of a round (answers generated, scored, trained on); empty if the run generates no answers."""
    if job.round_sizes is None or best.round_time is None:
        return []
    lines = []
    for line in round_lines(job.round_sizes, best.round_time):
        lines += wrap_text(line, indent=2)
    return lines


def enough_cards_text(answer: PlanAnswer) -> str:
    """The sentence on how many cards would do if nothing fits; empty if that is not known."""
    enough = answer.enough_cards
    if enough is None:
        return ""
    num_cards = enough.num_nodes * enough.ranks_per_node
    return f"{num_cards} cards would do ({' '.join(enough.overrides)})."


def _nothing_fits_lines(answer: PlanAnswer) -> list[str]:
    """Say that no option fits, what the smallest one lacks (memory of the host or of the GPU), and what would help."""
    smallest = answer.best_choices[0]  # if nothing fits, the choice that lacks least memory comes first
    overrides = " ".join(smallest.overrides)
    if smallest.node_memory_gib is not None and not smallest.fits_host:
        return wrap_text(
            f"Nothing fits: the smallest, {overrides}, takes {smallest.needed_host_gib:,.0f} GiB of a node's "
            f"{smallest.node_memory_gib:,.0f} GiB of "
            "host memory. Take fewer ranks a node, a smaller data.max_length, or leave strategy.offload_activations out; "
            "launcher.mem and hardware.node_memory_gib say what a node has.",
            indent=0,
        )
    return wrap_text(
        f"Nothing fits: the smallest, {overrides}, is {-smallest.memory_fit.margin_bytes / GIB:.1f} GiB too much. Take more "
        "cards (launcher.nodes, launcher.gpus_per_node), a smaller data.max_length, tuning=lora, a card with more memory, or "
        f"look at plan.offload=true. {enough_cards_text(answer)}".rstrip(),
        indent=0,
    )


def _long_step_notes(answer: PlanAnswer, best: PlannedChoice) -> list[str]:
    """Notes if a step of the best choice is too long for `launcher.signal_lead_s` (of SLURM) or `run.timeout_s`; else none."""
    return long_step_notes(best.variant.config, best.step_time.total_s, checkpoint_s(answer, best))


def _memory_tables(best: PlannedChoice) -> list[str]:
    """Show where the memory of the best option goes at its peak: tensors by kind, largest first, and what is beside them.

    Tensors are simulated. What the process holds beside them (CUDA's context, the allocator's reserve, NCCL) is estimated.
    """
    columns = (TableColumn(), TableColumn(is_number=True), TableColumn())
    bytes_by_kind = sorted(best.memory_peak.bytes_by_kind.items(), key=lambda kind_and_size: -kind_and_size[1])
    min_shown_bytes = 0.005 * GIB  # less would be shown as 0.00
    tensor_rows = [
        TableRow((str(kind), _gib_text(size), "")) for kind, size in bytes_by_kind if size >= min_shown_bytes
    ]
    process_rows = [
        TableRow(("process", _gib_text(best.memory_fit.process_bytes), "context and libraries")),
        TableRow(("allocator", _gib_text(best.memory_fit.allocator_bytes), "reserved beyond what is allocated")),
        TableRow(("NCCL", _gib_text(best.memory_fit.nccl_bytes), "buffers of its groups")),
    ]
    return [
        f"its peak, {_gib_text(best.memory_peak.total_bytes)} of tensors, in {best.memory_peak.phase}:",
        *format_table(columns, tensor_rows, indent=2),
        "beside them, estimated:",
        *format_table(columns, process_rows, indent=2),
    ]


def _gib_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def format_dollars(price: float) -> str:
    """A price in dollars and cents. A small job costs less than a cent, but not nothing."""
    return f"${price:,.2f}" if price >= 0.01 else "less than $0.01"


def cards_text(job: PlannedJob) -> str:
    """The number of GPUs of all nodes: "1 card", "8 cards"."""
    return "1 card" if job.world_size == 1 else f"{job.world_size} cards"


def budget_and_price_lines(best: PlannedChoice, job: PlannedJob) -> list[str]:
    """Say how long the planned run takes and what it costs, as far as that is known:

    - the hours of the budget, with its price; or, for budget.epochs without data, which setting would tell them;
    - without a price of the card: which setting would give it;
    - with a price but without hours: the price of a million tokens.
    """
    lines = _budget_lines(best, job)
    price_per_hour = job.card.price_per_hour  # of one card
    if price_per_hour is None:
        lines.append(
            f"what it costs is not known: no price was found for {job.card.name}; give hardware.price_per_hour"
        )
    elif best.budget_hours is None:
        dollars_per_second = job.world_size * price_per_hour / 3600
        token_price_line = f"a million tokens cost ${dollars_per_second / best.tokens_per_s * 1e6:.3f}"
        if best.variant.config.budget.epochs is None:
            token_price_line += "; with a budget (budget.tokens=...) the price of the whole run is shown"
        lines.append(token_price_line)
    return lines


def _budget_lines(best: PlannedChoice, job: PlannedJob) -> list[str]:
    """How long the run's budget takes: "the budget takes 3.20 hours on 8 cards: $51.20"; empty without a budget.

    For budget.epochs without `data.path`, it says instead that the data is needed to tell.
    """
    epochs = best.variant.config.budget.epochs
    if best.budget_hours is not None:
        price = "" if best.budget_dollars is None else f": {format_dollars(best.budget_dollars)}"
        return [f"the budget takes {best.budget_hours:,.2f} hours on {cards_text(job)}{price}"]
    if epochs is not None:
        return [f"how long budget.epochs={epochs:g} takes depends on the data: give data.path"]
    return []


def checkpoint_gib(answer: PlanAnswer, best: PlannedChoice) -> float:
    """Size of a checkpoint of the planned run in GiB: weights (fp32) and optimizer state of the parameters that are trained."""
    return checkpoint_bytes(answer.cost_model.num_trained_parameters, str(best.variant.config.optim.name)) / GIB


def checkpoint_s(answer: PlanAnswer, best: PlannedChoice) -> float:
    """Seconds to write a checkpoint. All nodes write at once, each at `card.disk_gb_s`: assumed, or measured by `from=`."""
    bytes_per_s = answer.planned_run.card.disk_gb_s * 1e9 * answer.planned_run.num_nodes
    return checkpoint_gib(answer, best) * GIB / bytes_per_s


def plan_as_json(answer: PlanAnswer, overrides: list[str], calibration_lines: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `plan --json` prints, as JSON values. Sizes are GiB, times seconds or hours, prices US dollars."""
    job = answer.planned_run
    cost_model = answer.cost_model
    best = answer.fastest_fitting_choice
    first = answer.best_choices[0]  # the best if one fits, else the one that lacks least memory
    return {
        "model": {
            "parameters": cost_model.num_parameters,
            "trained": cost_model.num_trained_parameters,
            "blocks": cost_model.num_blocks,
            "notes": list(cost_model.notes),
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
            "calibrated": [line.strip() for line in calibration_lines],
        },
        "job": {
            "nodes": job.num_nodes,
            "gpus_per_node": job.ranks_per_node,
            "precision": str(job.precision),
            "global_batch": job.global_batch,
            "layout": cost_model.layout,
            "mean_tokens": job.document_lengths.mean,
            "longest_tokens": int(job.document_lengths.longest[0]),
        },
        "typed": overrides,
        "best": None if best is None else list(best.overrides),
        "checkpoint_gib": checkpoint_gib(answer, first),
        "checkpoint_s": checkpoint_s(answer, first),
        "notes": [] if best is None else _long_step_notes(answer, best),
        "experts": {
            "imbalance": job.expert_imbalance,
            "imbalance_measured_over": job.imbalance_measured_over,
            "all_on_one_rank_gib": answer.worst_imbalance_fit and answer.worst_imbalance_fit.needed_bytes / GIB,
            "notes": expert_parallel_notes(answer),
        },
        "resting_gib": _gib_by_name(cost_model.resting_bytes_by_kind),
        "options": [_choice_as_json(choice, answer) for choice in answer.best_choices],
        "all": [_choice_as_json(choice, answer) for choice in answer.all_choices],
        "left_out": [
            {"settings": list(variant.overrides), "why": reason} for variant, reason in answer.refused_variants
        ],
    }


def _gib_by_name(sizes: Mapping[Any, int]) -> dict[str, float]:
    """The sizes, which are in bytes, as GiB under the same names."""
    return {str(key): size / GIB for key, size in sizes.items()}


def _choice_as_json(choice: PlannedChoice, answer: PlanAnswer) -> dict[str, Any]:
    """An option of a plan as JSON, for `plan --json`. Scripts read the keys: they stay, whatever the attributes are called.

    Sizes are GiB, times seconds but for `hours` of the budget, `price` US dollars.
    """
    memory_peak = choice.memory_peak
    return {
        "settings": list(choice.overrides),
        "strategy": choice.variant.name,
        "fits": choice.fits,
        "why": verdict_on_choice(choice, answer),
        "margin_gib": choice.memory_fit.margin_bytes / GIB,
        "peak_gib": memory_peak.total_bytes / GIB,
        "peak_at": str(memory_peak.phase),
        "theirs_gib": _peer_memory_as_json(choice, answer.planned_run),
        "kinds_gib": _gib_by_name(memory_peak.bytes_by_kind),
        # What the process takes beside tensors.
        "beside_gib": {
            "context": choice.memory_fit.process_bytes / GIB,
            "allocator": choice.memory_fit.allocator_bytes / GIB,
            "nccl": choice.memory_fit.nccl_bytes / GIB,
        },
        "micro": choice.micro_batch,
        "accumulation": choice.accumulation,
        "largest_micro": choice.largest_micro_batch,
        "tokens_per_s": choice.tokens_per_s,
        "step_s": _step_time_as_json(choice.step_time),
        "round_s": round_as_json(choice.round_time),
        "host_gib": choice.needed_host_gib,
        "hours": choice.budget_hours,
        "price": choice.budget_dollars,
    }


def _step_time_as_json(step_time: StepTime) -> dict[str, float]:
    """The predicted seconds of a step by what they are spent on, for `plan --json`. Scripts read the keys, so they stay.

    `exposed` is the part of `exchange` (communication) that computation does not hide.
    """
    return {
        "products": step_time.matmul_s,
        "moves": step_time.memory_bound_s,
        "exchange": step_time.communication_s,
        "exposed": step_time.exposed_communication_s,
        "update": step_time.optimizer_s,
        "total": step_time.total_s,
    }


def _peer_memory_as_json(choice: PlannedChoice, job: PlannedJob) -> dict[str, Any] | None:
    """What another trainer (the peer) would hold in the same step, in GiB, for `plan --json`; None without `plan.theirs`.

    `with_beside` is what it would take of a GPU: tensors, and what a process holds beside them.
    """
    peer = choice.peer_memory
    if peer is None:
        return None
    return {
        "total": peer.total / GIB,
        "at": peer.phase,
        "parts": _gib_by_name(peer.parts),
        "with_beside": peer_memory_gib(choice, job),
    }
