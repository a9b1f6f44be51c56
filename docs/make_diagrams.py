"""Draws the diagrams of the pages into docs/pictures, as SVG that follows the reader's light or dark theme.

    python docs/make_diagrams.py

Numbers come from the code or from a formula that the page names. What is only sketched says so in the picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.optim.schedule import ScheduleConfig, ScheduleName, lr_factor_at  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
EXPERIMENTS = ROOT / "benchmarks" / "results" / "course"
WIDTH = 720
"""Width of every diagram in its own units; a page scales it to the room that it has."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colours that people with any kind of colour vision can tell apart (Okabe and Ito 2008)."""
DASHES = ("", "8 4", "2 4", "12 4 2 4")
"""A dash for each colour, so that no line is known by its colour alone."""
STYLE = """
    text { font: 14px sans-serif; fill: #222 } .small { font-size: 12px } .frame { stroke: #666; fill: none }
    .box { fill: #f2f2f2; stroke: #666 } .new { fill: #0072b2; fill-opacity: 0.25; stroke: #0072b2 } .arrow { stroke: #666 }
    @media (prefers-color-scheme: dark) {
      text { fill: #eee } .frame, .arrow { stroke: #aaa } .box { fill: #333; stroke: #aaa }
    }"""

Point = tuple[float, float]


def text(x: float, y: float, words: str, *, anchor: str = "start", small: bool = False) -> str:
    """A line of text, whose anchor stands at (x, y)."""
    style = ' class="small"' if small else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, style: str = "box") -> str:
    """A rectangle in a style of `STYLE`."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{style}"/>'


def labelled_box(x: float, y: float, width: float, height: float, words: str, style: str = "box") -> str:
    """A rectangle with a line of text in its middle."""
    return box(x, y, width, height, style) + text(x + width / 2, y + height / 2 + 5, words, anchor="middle")


def line(points: Sequence[Point], index: int) -> str:
    """A line in the colour and the dash with this index."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] else ""
    return f'<polyline points="{path}" fill="none" stroke="{COLORS[index]}" stroke-width="2.5"{dash}/>'


def arrow(x: float, from_y: float, to_y: float) -> str:
    """An upright arrow from one height to another."""
    tip = 5 if to_y < from_y else -5
    head = f"{x - 4:g},{to_y + tip:g} {x:g},{to_y:g} {x + 4:g},{to_y + tip:g}"
    return f'<polyline points="{x:g},{from_y:g} {x:g},{to_y:g} {head}" fill="none" class="arrow"/>'


def path_arrow(points: Sequence[Point], words: str = "", words_at: Point | None = None) -> str:
    """An arrow along upright and level pieces, its tip at the last point; `words` are centred at `words_at`."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    (from_x, from_y), (to_x, to_y) = points[-2:]
    back_x = math.copysign(7, from_x - to_x) if from_x != to_x else 0.0
    back_y = math.copysign(7, from_y - to_y) if from_y != to_y else 0.0
    # The two barbs of the tip lie back from it, and to both sides of the last piece.
    side_x, side_y = back_y * 0.6, back_x * 0.6
    barb = f"{to_x + back_x + side_x:g},{to_y + back_y + side_y:g}"
    other_barb = f"{to_x + back_x - side_x:g},{to_y + back_y - side_y:g}"
    drawn = f'<polyline points="{path} {barb} {to_x:g},{to_y:g} {other_barb}" fill="none" class="arrow"/>'
    return drawn + (text(*words_at, words, anchor="middle", small=True) if words_at else "")


def drawing(height: int, title: str, parts: Sequence[str]) -> str:
    """The file of a diagram. `title` is what a screen reader says."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def schedules() -> str:
    """The learning rate of each schedule in a run of 100 steps, by the trainer's own function."""
    left, top, width, height = 60, 30, 480, 200
    parts = [box(left, top, width, height, "frame")]
    parts += [text(left - 8, top + 5, "1", anchor="end"), text(left - 8, top + height + 5, "0", anchor="end")]
    parts += [
        text(left, top - 10, "optim.lr times", small=True),
        text(left + width, top + height + 20, "step 100", anchor="end"),
    ]
    for index, name in enumerate(ScheduleName):
        config = ScheduleConfig(name=name, warmup_share=0.1)
        points = []
        for step in range(100):
            factor = lr_factor_at(config, step, 100)
            points.append((left + width * step / 99, top + height * (1 - factor)))
        label_y = top + 30 + 40 * index
        parts.append(line(points, index))
        parts.append(line([(left + width + 15, label_y), (left + width + 55, label_y)], index))
        parts.append(text(left + width + 62, label_y + 5, str(name)))
    return drawing(265, "The learning rate during a run of 100 steps under four schedules", parts)


def memory() -> str:
    """Bytes a trained parameter takes on each of four GPUs in bf16, as README's table of strategies has them.

    Weights, gradients and the two moments of Adam are fp32. DeepSpeed computes with a copy of the weights in bf16, and keeps the
    fp32 weights with the optimizer's state.
    """
    ranks = 4
    weights, gradients, moments = 4.0, 4.0, 8.0
    bf16_copy = 2.0
    deepspeed_state = (weights + moments) / ranks
    strategies = {
        "ddp": (weights, gradients, moments),
        "zero1": (bf16_copy, gradients, deepspeed_state),
        "zero2": (bf16_copy, gradients / ranks, deepspeed_state),
        "zero3": (bf16_copy / ranks, gradients / ranks, deepspeed_state),
        "fsdp2": (weights / ranks, gradients / ranks, moments / ranks),
    }
    left, scale = 130, 30
    parts = []
    for row, (name, sizes) in enumerate(strategies.items()):
        y = 20 + 46 * row
        parts.append(text(left - 10, y + 20, name, anchor="end"))
        x: float = left
        for color, size in zip(COLORS, sizes, strict=False):
            parts.append(f'<rect x="{x:g}" y="{y}" width="{size * scale:g}" height="28" fill="{color}" stroke="#fff"/>')
            x += size * scale
        parts.append(text(x + 8, y + 20, f"{sum(sizes):g} bytes"))
    for index, label in enumerate(("weights", "gradients", "optimizer state")):
        x = left + 150 * index
        parts.append(f'<rect x="{x}" y="258" width="14" height="14" fill="{COLORS[index]}"/>')
        parts.append(text(x + 20, 270, label))
    return drawing(286, "Bytes per trained parameter on each of four GPUs, by strategy", parts)


def batch() -> str:
    """How a global batch of 64 documents is divided among ranks, accumulation and micro-batches."""
    ranks, accumulation, micro = 4, 4, 4
    left, top, cell, gap = 110, 50, 34, 30
    total = ranks * accumulation * micro
    summary = f"one step: batch.global={total} documents = {micro} (batch.micro) x {accumulation} (accumulation) x {ranks} ranks"
    parts = [text(left, 25, summary)]
    for rank in range(ranks):
        y = top + rank * 44
        parts.append(text(left - 12, y + 22, f"rank {rank}", anchor="end"))
        for turn in range(accumulation):
            x = left + turn * (micro * 28 + gap)
            parts += [box(x + document * 28, y, 26, cell) for document in range(micro)]
    for turn in range(accumulation):
        middle = left + turn * (micro * 28 + gap) + micro * 14
        parts.append(text(middle, top + ranks * 44 + 16, f"micro-batch {turn + 1}", anchor="middle", small=True))
    return drawing(260, "How a global batch is divided into micro-batches on four ranks", parts)


def block() -> str:
    """A transformer block, and where each family of methods puts what it trains."""
    parts = []
    modules = (
        ("norm", 300), ("attention: q, k, v, o", 250), ("norm", 190), ("feed-forward: gate, up, down", 140),
    )  # fmt: skip
    parts.append(box(40, 90, 300, 260, "frame"))
    parts.append(text(50, 82, "one of many blocks", small=True))
    parts.append(arrow(190, 385, 340))
    for name, y in modules:
        parts.append(labelled_box(70, y, 240, 34, name))
    parts.append(arrow(190, 140, 100))
    parts.append(labelled_box(70, 385, 240, 34, "embeddings of the tokens"))
    parts.append(labelled_box(70, 30, 240, 34, "head: the next token"))
    places = (
        (395, "prompt, p_tuning: vectors before the text"),
        (310, "ln: the norms themselves"),
        (265, "prefix, adaption_prompt: keys and values"),
        (240, "lora and its kin: a change of each matrix"),
        (215, "ia3: factors of keys, values, features"),
        (155, "lora, ia3: here too"),
        (115, "bottleneck: a small network after each part"),
        (45, "classification: a new head"),
    )
    for y, words in places:
        parts.append(box(356, y - 8, 16, 16, "new"))
        parts.append(text(382, y + 5, words))
    return drawing(435, "A transformer block, and the place of each tuning method in it", parts)


def measured_curves(experiment: str, point: str) -> dict[str, list[Point]]:
    """(step, loss) of the curves of a run that was kept, by their names in its file; the run of seed 1."""
    record = json.loads((EXPERIMENTS / f"{experiment}.json").read_text(encoding="utf-8"))
    curves: dict[str, list[Point]] = record["points"][point]["1"]["curves"]
    return curves


def learning_curves() -> str:
    """Training and held-out losses of four real runs, as the experiments of the lessons kept them."""
    runs = {
        "healthy": measured_curves("curves", "healthy"),
        "overfitting": measured_curves("early_stopping", "to the end"),
        "rate too high": measured_curves("curves", "rate too high"),
        "forgetting": measured_curves("curves", "forgetting"),
    }
    labels = {"training": "training loss", "held_out": "held-out loss", "chat": "loss on a chat's questions"}
    width, height, top = 135, 120, 40
    parts = []
    for index, (name, curves) in enumerate(runs.items()):
        left = 30 + 175 * index
        points = [point for curve in curves.values() for point in curve]
        last_step = max(step for step, _ in points)
        highest = max(loss for _, loss in points)
        parts += [box(left, top, width, height, "frame"), text(left, top - 12, name)]
        parts.append(text(left - 4, top + 10, f"{highest:.1f}", anchor="end", small=True))
        parts.append(text(left - 4, top + height, "0", anchor="end", small=True))
        parts.append(text(left + width, top + height + 16, f"step {last_step}", anchor="end", small=True))
        for color, curve in enumerate(labels):
            places = []
            for step, loss in curves.get(curve, []):
                places.append((left + width * step / last_step, top + height * (1 - loss / highest)))
            if places:
                parts.append(line(places, color))
    for index, label in enumerate(labels.values()):
        x = 30 + 200 * index
        parts += [line([(x, 205), (x + 40, 205)], index), text(x + 48, 210, label)]
    return drawing(
        225,
        "The losses of four real runs: healthy, overfitting, a rate too high, and one that forgets a chat's answers",
        parts,
    )


def rewards() -> str:
    """Rewards of two runs of the demo with rewards, step by step, as they were kept (docs/reinforcement.md)."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "three_words.json").read_text(encoding="utf-8"))["runs"]
    honest, cheated = runs["three words"]["steps"], runs["no look at the end, 5 tokens"]["steps"]
    left, top, width, height = 50, 20, 400, 200
    curves = (
        ("reward", honest, "reward"),
        ("reward with a hole", cheated, "reward"),
        ("its control: answers that end", cheated, "rewards/ended/mean"),
    )
    parts = [box(left, top, width, height, "frame"), text(left + width, top + height + 20, "step 20", anchor="end")]
    parts += [text(left - 8, top + 5, "1", anchor="end"), text(left - 8, top + height + 5, "0", anchor="end")]
    for index, (label, steps, key) in enumerate(curves):
        points = [(left + width * row["step"] / 20, top + height * (1 - row[key])) for row in steps]
        label_y = top + 50 + 50 * index
        parts.append(line(points, index))
        parts.append(line([(left + width + 12, label_y), (left + width + 42, label_y)], index))
        parts.append(text(left + width + 50, label_y + 5, label))
    return drawing(250, "Two runs that learn from rewards: in one the control falls while the reward rises", parts)


def lora() -> str:
    """A weight matrix with LoRA: the frozen W, and the thin A and B that are trained; drawn for a rank of an eighth."""
    parts = [
        labelled_box(40, 40, 200, 200, "W: frozen"),
        text(140, 262, "out x in", anchor="middle", small=True),
        text(275, 145, "+", anchor="middle"),
        labelled_box(310, 40, 34, 200, "B", "new"),
        text(327, 262, "out x rank", anchor="middle", small=True),
        text(372, 145, "x", anchor="middle"),
        labelled_box(400, 123, 200, 34, "A", "new"),
        text(500, 177, "rank x in", anchor="middle", small=True),
        text(500, 85, "times alpha / rank", anchor="middle"),
        text(370, 220, "4096 x 4096 at rank 16: W has 16,777,216 weights,"),
        text(370, 240, "A and B together have 131,072 (0.8 %)"),
    ]
    return drawing(
        280, "LoRA: a large frozen matrix, and two thin trained matrices whose product is added to it", parts
    )


@dataclass(frozen=True, slots=True)
class RankMoment:
    """What each rank holds in a moment of a step, and what the ranks exchange in it."""

    weights: str
    gradients: str
    """`whole`, `part` (a quarter on each of four ranks), `block` (a part, and one block whole) or `none`."""
    exchange: str = ""


STEP_BY_STRATEGY = {
    "ddp": (
        RankMoment("whole", "none"),
        RankMoment("whole", "whole", "gradients: all-reduce"),
        RankMoment("whole", "whole", "every rank updates all"),
    ),
    "zero2": (
        RankMoment("whole", "none"),
        RankMoment("whole", "part", "gradients: reduce"),
        RankMoment("whole", "part", "own part, then gather"),
    ),
    "fsdp2": (
        RankMoment("block", "none", "gather a block, use it, free it"),
        RankMoment("block", "part", "gather; reduce-scatter"),
        RankMoment("part", "part", "own part, no exchange"),
    ),
}
"""Forward pass, backward pass and update of one micro-batch, by strategy (docs/choosing-a-strategy.md)."""


def held_by_rank(x: float, y: float, rank: int, amount: str, color: str) -> list[str]:
    """A box of the whole model's size, filled with what this rank of four holds of it."""
    width, height = 28, 24
    quarter = height / 4
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" class="frame"/>']
    filled = {"whole": (y, height), "part": (y + rank * quarter, quarter), "block": (y + rank * quarter, quarter)}
    if amount in filled:
        top, size = filled[amount]
        parts.append(f'<rect x="{x:g}" y="{top:g}" width="{width}" height="{size:g}" fill="{color}"/>')
    if amount == "block":  # one of six blocks, gathered on every rank
        parts.append(
            f'<rect x="{x + width - 9:g}" y="{y:g}" width="9" height="{height}" fill="{color}" opacity="0.5"/>'
        )
    return parts


def step_on_ranks() -> str:
    """What each of four ranks holds of weights, gradients and optimizer state in the parts of a step."""
    left, column, row_height = 80, 214, 128
    parts = [
        text(left + 68 + column * index, 20, name, anchor="middle")
        for index, name in enumerate(("forward", "backward", "update"))
    ]
    for row, (strategy, moments) in enumerate(STEP_BY_STRATEGY.items()):
        top = 34 + row * row_height
        parts.append(text(10, top + 46, strategy))
        optimizer = "whole" if strategy == "ddp" else "part"
        for index, moment in enumerate(moments):
            x = left + column * index
            parts.append(box(x - 8, top, column - 18, row_height - 14, "frame"))
            for rank in range(4):
                for kind, amount in enumerate((moment.weights, moment.gradients, optimizer)):
                    parts += held_by_rank(x + rank * 47, top + 8 + kind * 28, rank, amount, COLORS[kind])
            parts.append(text(x, top + 107, moment.exchange, small=True))
    for index, label in enumerate(("weights", "gradients", "optimizer state")):
        x = left + 110 * index
        parts.append(f'<rect x="{x}" y="422" width="14" height="14" fill="{COLORS[index]}"/>')
        parts.append(text(x + 20, 434, label))
    parts.append(text(WIDTH - 10, 434, "four ranks; pale: one block, whole for a moment", anchor="end", small=True))
    return drawing(
        446, "What four ranks hold in the forward pass, backward pass and update, under ddp, zero2 and fsdp2", parts
    )


def run_life() -> str:
    """The states of a run, as `shardtune status` names them, and what leads from one to the next."""
    parts = [
        labelled_box(20, 40, 110, 40, "queued"),
        labelled_box(300, 40, 120, 40, "running", "new"),
        labelled_box(590, 40, 110, 40, "done"),
        labelled_box(130, 180, 120, 40, "preempted"),
        labelled_box(300, 180, 120, 40, "lost"),
        labelled_box(470, 180, 120, 40, "failed"),
        path_arrow([(130, 60), (300, 60)], "SLURM starts the job", (215, 52)),
        path_arrow([(420, 60), (590, 60)], "last step, export", (505, 52)),
        path_arrow([(320, 80), (320, 130), (190, 130), (190, 180)], "told to stop: it saves", (230, 122)),
        path_arrow([(360, 80), (360, 180)], "killed, no message", (422, 162)),
        path_arrow([(400, 80), (400, 130), (530, 130), (530, 180)], "an error", (470, 122)),
        path_arrow([(190, 220), (190, 262), (680, 262), (680, 100), (412, 100), (412, 80)]),
        path_arrow([(360, 220), (360, 262)]),
        path_arrow([(530, 220), (530, 262)]),
        text(360, 284, "the same command: it continues from the newest intact checkpoint", anchor="middle"),
    ]
    return drawing(
        296, "States of a run: queued, running, done; preempted, lost or failed, and back by the same command", parts
    )


def preparation() -> str:
    """The steps that rows go through before training, in the order of docs/data-preparation.md."""
    steps = (
        ("read", "bad rows"),
        ("checks", "reported"),
        ("cleaning", "mended"),
        ("filters", "too short, too long"),
        ("personal data", "redacted"),
        ("decontamination", "test questions"),
        ("tokens", "nothing to learn"),
        ("duplicates", "copies"),
        ("held-out splits", "set aside"),
        ("leakage", "copies of held-out"),
        ("balance", "repeated, left out"),
    )
    width, height, gap = 128, 36, 16
    parts = []
    for index, (name, outcome) in enumerate(steps):
        row, column = divmod(index, 5)
        x, y = 8 + column * (width + gap), 20 + row * 92
        parts.append(labelled_box(x, y, width, height, name))
        parts.append(text(x + width / 2, y + height + 16, outcome, anchor="middle", small=True))
        if column < 4:
            parts.append(path_arrow([(x + width, y + height / 2), (x + width + gap, y + height / 2)]))
        elif row < 2:
            # Around the end of the row, and down to the first step of the next one.
            middle = y + height / 2
            right = x + width + 6
            between = y + 70
            parts.append(
                path_arrow([(x + width, middle), (right, middle), (right, between), (72, between), (72, y + 92)])
            )
    parts.append(labelled_box(8 + width + gap, 204, width, height, "training", "new"))
    parts.append(
        text(8 + 2 * (width + gap), 227, "rows read = rows kept + rows dropped, each for one reason", small=True)
    )
    return drawing(
        262, "Eleven steps from a file of rows to training data, and what each may leave out or change", parts
    )


def fine_tuning() -> str:
    """What goes into fine-tuning, and what comes out of it."""
    parts = [
        labelled_box(20, 30, 200, 44, "base model"),
        text(120, 92, "has read billions of words", anchor="middle", small=True),
        labelled_box(20, 126, 200, 44, "your examples"),
        text(120, 188, "often a hundred to a thousand", anchor="middle", small=True),
        labelled_box(290, 78, 150, 44, "fine-tuning", "new"),
        text(365, 140, "more of the same training", anchor="middle", small=True),
        labelled_box(510, 30, 190, 44, "a whole new model"),
        text(605, 92, "all weights changed", anchor="middle", small=True),
        labelled_box(510, 126, 190, 44, "an adapter", "new"),
        text(605, 188, "a small file, used with the base", anchor="middle", small=True),
        path_arrow([(220, 52), (255, 52), (255, 92), (290, 92)]),
        path_arrow([(220, 148), (255, 148), (255, 108), (290, 108)]),
        path_arrow([(440, 92), (475, 92), (475, 52), (510, 52)]),
        path_arrow([(440, 108), (475, 108), (475, 148), (510, 148)]),
    ]
    return drawing(
        204, "A base model and your examples go into fine-tuning; a new model or an adapter comes out", parts
    )


def when_to_tune() -> str:
    """Three questions that come before fine-tuning."""
    questions = (
        ("Do the facts change, or need a source?", "retrieval"),
        ("Does a prompt with a few examples do it?", "keep the prompt"),
        ("Have you a hundred good examples?", "fine-tune"),
    )
    parts = []
    for index, (question, answer) in enumerate(questions):
        y = 20 + 76 * index
        is_last = index == len(questions) - 1
        parts.append(labelled_box(20, y, 320, 44, question))
        parts.append(labelled_box(470, y, 230, 44, answer, "new" if is_last else "box"))
        parts.append(path_arrow([(340, y + 22), (470, y + 22)], "yes", (405, y + 15)))
        parts.append(path_arrow([(180, y + 44), (180, y + 76)], "no", (200, y + 64)))
    parts.append(labelled_box(20, 248, 320, 44, "collect examples, or let a larger model write them"))
    return drawing(306, "Three questions before fine-tuning: retrieval, a prompt, or enough examples", parts)


DIAGRAMS = {
    "fine-tuning.svg": fine_tuning,
    "when-to-tune.svg": when_to_tune,
    "schedules.svg": schedules,
    "memory.svg": memory,
    "batch.svg": batch,
    "block.svg": block,
    "learning-curves.svg": learning_curves,
    "lora.svg": lora,
    "rewards.svg": rewards,
    "step.svg": step_on_ranks,
    "run-life.svg": run_life,
    "preparation.svg": preparation,
}


def main() -> None:
    """Write every diagram."""
    for name, draw in DIAGRAMS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
