"""Benchmark of training: shardtune, its peers and a bare loop on the same model and data, in turn.

Makes the model, the data, an environment for each peer, and `benchmarks/results/training*.md` with a `.json` of all
figures beside it. Every trainer is a process of its own (`benchmarks/peers/train_*.py`); see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from environments import PACKAGES, WORK, hardware, install
from training import gpu, inputs, lengths, ranks, tables
from training.cases import GROUPS, Group
from training.drive import Measured, Work, run

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("trl", "litgpt", "torchtune", "llamafactory", "axolotl")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [group.name for group in GROUPS]
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"environments of peers, of {', '.join(PEERS)}; or none"
    )
    parser.add_argument("--groups", default=",".join(names), help=f"comparisons, of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=3, help="stretches of each trainer, in turn")
    parser.add_argument("--steps", type=int, default=3, help="steps of a stretch")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first stretch")
    parser.add_argument(
        "--ranks", type=int, help="instead: shardtune's strategies on this many processes of one thread"
    )
    parser.add_argument("--lengths", action="store_true", help="instead: shardtune over sequence lengths and packs")
    parser.add_argument("--gpu", action="store_true", help="instead: sizes for one GPU of 80 GB")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and one round; with --gpu on the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the tables")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name and name != "none"]
    args.groups = [name for name in args.groups.split(",") if name]
    for option, given, known in (("peers", args.peers, PEERS), ("groups", args.groups, names)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    return args


def compare(
    groups: list[Group], work: Work, failed: dict[str, str], *, together: bool
) -> dict[str, dict[str, Measured]]:
    """Run the comparisons one after the other; what failed is added to `failed`."""
    found = {}
    for group in groups:
        print(f"{group.title}:", flush=True)
        found[group.name], trouble = run(group.cases, work, together=together)
        failed |= {f"{group.name}: {name}": why for name, why in trouble.items()}
    return found


def without(groups: tuple[Group, ...], names: list[str], environments: set[str]) -> list[Group]:
    """The named comparisons with the trainers whose environment is there."""
    return [
        dataclasses.replace(
            g, cases=tuple(c for c in g.cases if c.environment is None or c.environment in environments)
        )
        for g in groups
        if g.name in names
    ]


def report(
    groups: list[Group], found: dict[str, dict[str, Measured]], facts: dict[str, Any], failed: dict[str, str]
) -> str:
    """The results as Markdown."""
    made = {group.name: tables.rows(group, found[group.name]) for group in groups}
    loads = [load for each in found.values() for one in each.values() for load in one.load] or [0.0]
    versions = sorted({one["version"] for group in made.values() for one in group})
    lines = [
        "# Training: results",
        "",
        f"Command: `{facts['command']}` ({facts['minutes']:.0f} minutes)",
        "",
        "Setup ([how it is measured](../README.md#training)):",
        "",
        f"- **Machine:** {facts['hardware']}; load average {min(loads):.1f} to {max(loads):.1f}. One thread.",
        f"- **Versions:** {'; '.join(versions)}.",
        f"- **Model:** {facts['model']}.",
        "- **Training:** 4 conversations per step (about 150 tokens each, at most 512), or packs of 512 tokens. AdamW with a "
        "constant learning rate of 1e-3, gradients clipped to norm 1.",
        f"- **Speed:** medians of {facts['rounds']} rounds of {facts['steps']} steps, after {facts['warm']} warm-up steps. The "
        "trainers take turns.",
        "- **Additional work of shardtune:** logging, evaluations before, during and after training, and checkpoints during "
        "and after training. Evaluations and checkpoints are included in its memory, and not in its speed.",
    ]
    for group in groups:
        lines += ["", f"## {group.title}", "", *tables.table(made[group.name])]
        ours = next((one for one in made[group.name] if one["name"] == "shardtune"), None)
        if ours and ours["aside_cpu_s"]:
            lines += [
                "",
                f"shardtune's evaluation and checkpoint between the rounds took {ours['aside_cpu_s']:.1f} more CPU seconds.",
            ]
    if goals := tables.targets(made):
        lines += ["", "## Goals", "", *goals]
    if failed:
        lines += ["", "## Left out", "", *[f"- {name}: {trouble}" for name, trouble in failed.items()]]
    return "\n".join(lines) + "\n"


def keep(directory: Path, name: str, text: str, facts: dict[str, Any]) -> None:
    """The table as Markdown and the figures as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> int:
    """Install, run, check that the losses agree, and write the results; 1 where something failed or disagrees."""
    args = arguments()
    began = time.monotonic()
    WORK.mkdir(exist_ok=True)
    facts: dict[str, Any] = {
        "command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]),
        "hardware": hardware(),
    }
    facts |= {"rounds": 1 if args.dry_run else args.rounds, "steps": args.steps, "warm": args.warm}
    if args.gpu:
        return gpu.main(args, facts, compare, keep)
    size = inputs.TINY if args.dry_run else inputs.SMALL
    facts["model"] = (
        f"Llama of {size.name} parameters ({size.matmul_parameters / 1e6:.1f} M of them in matrix products)"
    )
    work = Work(inputs.make(WORK / f"training-{size.name}", size), args.warm, args.steps, facts["rounds"])
    if args.ranks:
        return ranks.main(args, facts, work, keep)
    if args.lengths:
        return lengths.main(args, facts, work, size, keep)
    failed = {name: trouble for name in args.peers if (trouble := install(name)) is not None}
    groups = without(GROUPS, args.groups, set(args.peers) - set(failed))
    found = compare(groups, work, failed, together=True)
    facts["minutes"] = (time.monotonic() - began) / 60
    facts["load"] = os.getloadavg()
    text = report(groups, found, facts, failed)
    made = {group.name: tables.rows(group, found[group.name]) for group in groups}
    raw = {group: {name: dataclasses.asdict(one) for name, one in each.items()} for group, each in found.items()}
    keep(args.results, "training", text, {**facts, "rows": made, "measured": raw, "failed": failed})
    return int(bool(failed) or not all(one["agrees"] for group in made.values() for one in group))


if __name__ == "__main__":
    assert PACKAGES.keys() >= set(PEERS)
    sys.exit(main())
