"""Draws the diagrams of the pages into docs/pictures, as SVG that follows the reader's light or dark theme.

    python docs/make_diagrams.py

Numbers come from the code or from a formula that the page names. What is only sketched says so in the picture.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.optim.schedule import ScheduleConfig, ScheduleName, lr_factor_at  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
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
    """Bytes a parameter takes on each of four GPUs, by the formula of the ZeRO paper for Adam in mixed precision."""
    ranks = 4
    weights, gradients, optimizer = 2.0, 2.0, 12.0
    strategies = {
        "ddp": (weights, gradients, optimizer),
        "zero1": (weights, gradients, optimizer / ranks),
        "zero2": (weights, gradients / ranks, optimizer / ranks),
        "zero3, fsdp2": (weights / ranks, gradients / ranks, optimizer / ranks),
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
        parts.append(f'<rect x="{x}" y="212" width="14" height="14" fill="{COLORS[index]}"/>')
        parts.append(text(x + 20, 224, label))
    return drawing(240, "Bytes per parameter on each of four GPUs, by strategy", parts)


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


def learning_curves() -> str:
    """Four shapes of the training loss and the held-out loss; sketched, not measured."""
    shapes: tuple[tuple[str, Callable[[float], float], Callable[[float], float]], ...] = (
        ("good", lambda t: 0.3 + 0.6 * math.exp(-4 * t), lambda t: 0.38 + 0.52 * math.exp(-4 * t)),
        (
            "overfitting",
            lambda t: 0.1 + 0.8 * math.exp(-4 * t),
            lambda t: 0.55 * math.exp(-5 * t) + 0.35 + 0.45 * t * t,
        ),
        ("rate too small", lambda t: 0.9 - 0.12 * t, lambda t: 0.92 - 0.1 * t),
        (
            "rate too large",
            lambda t: min(0.98, 0.5 + 0.42 * t + 0.08 * math.sin(40 * t)),
            lambda t: min(0.98, 0.6 + 0.4 * t),
        ),
    )
    parts = []
    width, height = 150, 120
    for index, (name, training, held_out) in enumerate(shapes):
        left, top = 20 + 175 * index, 40
        parts.append(box(left, top, width, height, "frame"))
        parts.append(text(left, top - 12, name))
        for color, curve in enumerate((training, held_out)):
            points = [(left + width * step / 50, top + height * (1 - curve(step / 50))) for step in range(51)]
            parts.append(line(points, color))
    for index, label in enumerate(("training loss", "held-out loss")):
        x = 20 + 200 * index
        parts.append(line([(x, 190), (x + 40, 190)], index))
        parts.append(text(x + 48, 195, label))
    parts.append(text(WIDTH - 20, 195, "steps to the right; sketched, not measured", anchor="end", small=True))
    return drawing(210, "Four shapes of learning curves: good, overfitting, a rate too small, a rate too large", parts)


DIAGRAMS = {
    "schedules.svg": schedules,
    "memory.svg": memory,
    "batch.svg": batch,
    "block.svg": block,
    "learning-curves.svg": learning_curves,
}


def main() -> None:
    """Write every diagram."""
    for name, draw in DIAGRAMS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
