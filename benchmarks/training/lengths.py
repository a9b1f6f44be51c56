"""shardtune over sequence lengths and packs: the cost beside what attention's arithmetic says."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from environments import WORK

from training.cases import OURS, Case
from training.drive import Work, run
from training.inputs import Size
from training.tables import rate

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
PACKS = (512, 2048, 8192)
TOKENS = 8192
"""Tokens of a step, for every length."""


def texts(work: Work, length: int, count: int) -> Path:
    """Inputs like `work`'s, with `count` texts of at least `length` tokens in place of the conversations; made once."""
    directory = WORK / f"{work.inputs.name}-{length}x{count}"
    if (directory / "done").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "model").symlink_to(work.inputs / "model")
    for name in ("eval.jsonl", "eval_tokens.jsonl"):
        (directory / name).symlink_to(work.inputs / name)
    said = [m["content"] for line in (work.inputs / "train.jsonl").open() for m in json.loads(line)["messages"]]
    made, at = [], 0
    for number in range(count):
        words: list[str] = [f"{number}"]
        while len(words) < length:  # a word is at least one token
            words += said[at % len(said)].split()
            at += 1
        made.append(json.dumps({"text": " ".join(words)}))
    (directory / "train.jsonl").write_text("\n".join(made) + "\n", encoding="utf-8")
    (directory / "done").touch()
    return directory


def cases(work: Work, steps: int) -> dict[Case, tuple[str, int]]:
    """{case: (which table, length)}; every case's steps have the same number of tokens."""
    found = {}
    for length in LENGTHS:
        batch = TOKENS // length
        where = texts(work, length, batch * steps)
        words = (f"--inputs={where}", f"--batch={batch}", f"--longest={length}")
        found[dataclasses.replace(OURS, name=f"length {length}", options=words)] = ("length", length)
    for length in PACKS:
        words = ("--layout=packed", f"--pack={length}", f"--packs={TOKENS // length}")
        found[dataclasses.replace(OURS, name=f"packs of {length}", options=words)] = ("packs", length)
    return found


def main(args: argparse.Namespace, facts: dict[str, Any], work: Work, size: Size, keep: Callable[..., None]) -> int:
    """Measure one after the other, and write `training_lengths`; 1 where a case failed."""
    began = time.monotonic()
    work = dataclasses.replace(work, warm=1, steps=1)
    wanted = cases(work, work.warm + work.steps * work.rounds)
    measured, failed = run(tuple(wanted), work, together=False)  # 8,192 tokens take 3 GB each
    counted = [len(json.loads(line)["input_ids"]) for line in (work.inputs / "train_tokens.jsonl").open()]
    made = []
    base = None
    for case, (kind, length) in wanted.items():
        if case.name not in measured:
            continue
        stretches = measured[case.name].stretches
        one: dict[str, Any] = {"kind": kind, "length": length, "rate": median(rate(s, "cpu") for s in stretches)}
        # Tokens of a pack attend within their own document: the square-weighted mean length counts, not the pack's.
        seen = length if kind == "length" else sum(n * n for n in counted) / sum(counted)
        one |= {"mflops": size.flops_per_token(seen) / 1e6, "seen": seen}
        base = base or one
        expected = base["mflops"] / one["mflops"]
        one |= {"expected": expected, "relative": one["rate"] / base["rate"], "peak": stretches[-1]["peak"]}
        one |= {"tokens": mean(s["tokens"] for s in stretches)}
        made.append(one)
    facts |= {"minutes": (time.monotonic() - began) / 60, "rows": made, "failed": failed}
    keep(args.results, "training_lengths", report(made, facts, failed), facts)
    return int(bool(failed))


def report(made: list[dict[str, Any]], facts: dict[str, Any], failed: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = [
        "# Training over lengths: results",
        "",
        f"Command: `{facts['command']}` ({facts['minutes']:.0f} minutes)",
        "",
        f"Setup: full fine-tuning in fp32 with shardtune. {facts['model']}, one thread, about {TOKENS:,} tokens per step. "
        f"{facts['hardware']}. Medians of {facts['rounds']} steps.",
        "",
        "The column *expected* is the speed that the number of operations alone would give, relative to the first row. It "
        "includes attention with 6 x layers x hidden size x length operations per token, and assumes that attention runs at "
        "the speed of matrix products. In a pack, each conversation attends only to itself, so the length of packs should not "
        "matter.",
        "",
        "| work | tokens/CPU-s | relative to the first row | expected | MFLOP per token | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in made:
        name = f"documents of {one['length']:,} tokens"
        if one["kind"] == "packs":
            name = f"conversations in packs of {one['length']:,}"
        lines.append(
            f"| {name} | {one['rate']:,.0f} | {one['relative']:.2f} | {one['expected']:.2f} | {one['mflops']:.0f} | "
            f"{one['peak']:,.0f} |"
        )
    lines += [f"\nLeft out: {name}: {trouble}" for name, trouble in failed.items()]
    return "\n".join(lines) + "\n"
