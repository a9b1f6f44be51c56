"""The answer of a plan as a table of 80 columns, and as JSON."""

from __future__ import annotations

from typing import Any

from trainer.forecast.plan import Choice
from trainer.forecast.sweep import Answer
from trainer.planning.hardware import GIB
from trainer.planning.receipt import checkpoint_bytes


def text(answer: Answer, words: list[str]) -> str:
    """What a person reads; `words` are those that were typed."""
    job, form = answer.job, answer.form
    mean = job.lengths.mean
    lines = [
        f"{form.parameters / 1e9:.2f} billion parameters, {form.trained / 1e9:.3f} trained; {job.precision} on {job.world} x "
        f"{job.card.name}",
        f"({job.nodes} of {job.per_node}); a step is {job.global_batch} x {mean:,.0f} tokens; {form.layout} rows",
        "",
        f"{'strategy':<9}{'recompute':<10}{'':<8}{'micro':>6}{'GiB':>8}{'of ' + format(job.card.memory_gib, '.1f'):>10}"
        f"{'largest':>8}{'tokens/s':>10}  why",
    ]
    lines += [_row(choice, answer) for choice in answer.found]
    lines += ["", *_best(answer, words)]
    if form.notes:
        lines += ["", "chosen for you:"]
        lines += [line for note in form.notes for line in _folded(f"  {note}")]
    if answer.refused:
        lines += ["", "left out:"]
        for reason, of in _by_reason(answer).items():
            lines += _folded(f"  {of}: {reason}")
    lines += [
        "",
        *_folded(
            "Expected, not measured: the memory of tensors is simulated, what is beside them and all speeds are "
            "reckoned (docs/planning.md)."
        ),
    ]
    return "\n".join(lines)


def _by_reason(answer: Answer) -> dict[str, str]:
    """Ways that were left out for the same reason, named together."""
    found: dict[str, list[str]] = {}
    for way, reason in answer.refused:
        mode = str(way.config.strategy.activation_checkpointing)
        found.setdefault(reason, []).append(f"{way.name}, {mode}{' offloaded' if way.offload else ''}")
    return {reason: "; ".join(dict.fromkeys(of)) for reason, of in found.items()}


def _row(choice: Choice, answer: Answer) -> str:
    extra = ("offload" if choice.way.offload else "") or (
        str(choice.way.config.model.quantisation) if str(choice.way.config.model.quantisation) != "none" else ""
    )
    mode = str(choice.way.config.strategy.activation_checkpointing)
    speed = f"{choice.tokens_per_s:,.0f}" if choice.fits else "-"
    left = f"{choice.fit.margin / GIB:+.1f}"
    return (
        f"{choice.way.name:<9}{mode:<10}{extra:<8}{choice.micro:>6}{choice.fit.total / GIB:>8.1f}{left:>10}"
        f"{choice.largest_micro:>8}{speed:>10}  {why(choice, answer)}"
    )


def why(choice: Choice, answer: Answer) -> str:
    """Why a way was chosen, or not."""
    best = answer.best
    if choice is best:
        return "fastest"
    if not choice.fits:
        return "too large"
    assert best is not None
    share = choice.tokens_per_s / best.tokens_per_s
    return "as fast" if share > 0.995 else f"{share:.2f} x"


def _best(answer: Answer, words: list[str]) -> list[str]:
    best, job = answer.best, answer.job
    if best is None:
        least = answer.found[0]
        short = -least.fit.margin / GIB
        return _folded(
            f"Nothing fits: the smallest, {' '.join(least.words)}, is {short:.1f} GiB too much. Take more cards "
            "(launcher.nodes, launcher.gpus_per_node), a smaller data.max_length, tuning=lora, a card with more memory, or look "
            "at plan.offload=true."
        )
    parts = sorted(best.taken.kinds.items(), key=lambda item: -item[1])
    lines = _pasted(words, best)
    lines += ["", f"its peak, {best.taken.total / GIB:.2f} GiB of tensors, in {best.taken.peak}:"]
    lines += [f"  {kind:<14}{size / GIB:8.2f} GiB" for kind, size in parts if size >= 0.005 * GIB]
    lines += [
        "beside them, reckoned:",
        f"  {'process':<14}{best.fit.context / GIB:8.2f} GiB   context and libraries",
        f"  {'allocator':<14}{best.fit.allocator / GIB:8.2f} GiB   reserved beyond what is allocated",
        f"  {'NCCL':<14}{best.fit.exchange / GIB:8.2f} GiB   buffers of its groups",
        f"host memory about {best.host_gib:.0f} GiB a node; a checkpoint is {checkpoint_gib(answer, best):.2f} GiB, "
        f"{checkpoint_s(answer, best):,.0f} s to write",
    ]
    step = best.step
    lines += [
        f"a step takes {step.total_s:.2f} s: products {step.products_s:.2f}, what memory bounds {step.moves_s:.2f}, exchange "
        f"{step.exposed_s:.2f}",
        f"  (of {step.exchange_s:.2f}, the rest hidden), update {step.update_s:.2f}",
    ]
    if best.hours is not None:
        cost = "no price is known" if best.price is None else f"${best.price:,.2f}"
        lines.append(f"the budget takes {best.hours:,.2f} hours on {job.world} cards: {cost}")
    elif job.card.price_per_hour is not None:
        million = job.world * job.card.price_per_hour / best.tokens_per_s / 3600 * 1e6
        lines.append(f"a million tokens cost ${million:.3f}; with a budget (budget.tokens=...) the whole is told")
    return lines


def _pasted(words: list[str], best: Choice) -> list[str]:
    """The command, in lines of 80 columns where its words allow."""
    typed = {word.split("=")[0] for word in words}
    cluster = "launcher=slurm" in words or "launcher.gpus_per_node" in typed
    chosen = {word.split("=")[0] for word in best.words}
    kept = [word for word in words if word.split("=")[0] not in chosen]
    out, line = [], f"shardtune {'submit' if cluster else 'train'}"
    for word in [*kept, *best.words]:
        if len(line) + len(word) + 3 > 80:
            out.append(f"{line} \\")
            line = "   "
        line += f" {word}"
    lacking = [] if any(key.startswith("budget.") for key in typed) else ["a budget"]
    lacking += [] if any(key == "data.path" or key.startswith("data.sources.") for key in typed) else ["data.path"]
    return [*out, line, *([f"(with {' and '.join(lacking)} of your own)"] if lacking else [])]


def checkpoint_gib(answer: Answer, best: Choice) -> float:
    """GiB of a checkpoint: of what trains, its weights in fp32 and the optimizer's state."""
    return checkpoint_bytes(answer.form.trained, str(best.way.config.optim.name)) / GIB


def checkpoint_s(answer: Answer, best: Choice) -> float:
    """Seconds to write one, at the rate that the card's file assumes of a node's disk."""
    rate = answer.job.card.disk_gb_s * 1e9 * answer.job.nodes
    return checkpoint_gib(answer, best) * GIB / rate


def _folded(said: str, width: int = 80) -> list[str]:
    import textwrap

    return textwrap.wrap(said, width, subsequent_indent="    " if said.startswith(" ") else "", drop_whitespace=True)


def as_dict(answer: Answer, words: list[str]) -> dict[str, Any]:
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


def _choice(choice: Choice, answer: Answer) -> dict[str, Any]:
    return {
        "words": list(choice.words),
        "strategy": choice.way.name,
        "fits": choice.fits,
        "why": why(choice, answer),
        "margin_gib": choice.fit.margin / GIB,
        "peak_gib": choice.taken.total / GIB,
        "peak_at": str(choice.taken.peak),
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
