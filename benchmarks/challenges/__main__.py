"""Runs everything, or the parts that were named; prints the tables and writes the results."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.challenges import course as courses
from benchmarks.challenges import losses, people, rewards
from benchmarks.challenges.language import base_of

RESULTS = Path(__file__).parent.parent / "results" / "challenges.json"
SEEDS, NULLS, OF_REMEDIES = range(5), range(20), range(3)
MADE_UP = range(20)
DRIFT = "3e-4"
"""A rate at which the model that knows the language gets worse at it by a percent or two."""

Part = Callable[[Path, Path], dict[str, list[dict[str, Any]]]]
"""Runs of one kind by what is varied: one answer a seed."""


def overfitting(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Fewer and fewer documents."""
    return {
        f"{count} documents": [
            losses.overfitting(directory, base, f"few-{count}-{seed}", seed, count, []) for seed in SEEDS
        ]
        for count in losses.OVERFIT
    }


def forgetting(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Higher and higher rates."""
    return {
        f"rate {rate}": [losses.forgetting(directory, base, f"other-{rate}-{seed}", seed, rate, []) for seed in SEEDS]
        for rate in losses.FORGET
    }


def none(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Nothing to find: a rate at which losses hover, and one at which both drift upwards together."""
    return {
        f"rate {rate}": [losses.nothing(directory, base, f"none-{rate}-{seed}", seed, rate) for seed in NULLS]
        for rate in ("1e-4", DRIFT)
    }


def remedies(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """What each does to the same runs."""
    found = {}
    for number, (name, more) in enumerate(losses.AGAINST_OVERFITTING.items()):
        found[f"overfitting: {name}"] = [
            losses.overfitting(directory, base, f"against-overfitting-{number}-{seed}", seed, losses.MANY, more)
            for seed in OF_REMEDIES
        ]
    for number, (name, more) in enumerate(losses.AGAINST_FORGETTING.items()):
        found[f"forgetting: {name}"] = [
            losses.forgetting(directory, base, f"against-forgetting-{number}-{seed}", seed, losses.RATE, more)
            for seed in OF_REMEDIES
        ]
    return found


def wronged(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """A larger and larger share of one group's rows with the wrong label, and none but by accident."""
    found = {
        f"{share:.0%} wronged": [people.bias(directory, base, f"bias-{share}-{seed}", seed, share) for seed in SEEDS]
        for share in people.WRONGED
    }
    for name, seen in (("none", True), ("none, and no group in the text", False)):
        runs = [people.bias(directory, base, f"bias-none-{seen}-{seed}", 100 + seed, 0.1, seen=seen) for seed in NULLS]
        found[name] = runs
    return found


def canaries(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """More and more copies of each secret, and none."""
    found = {
        f"{copies} copies": [people.secrets(directory, base, f"code-{copies}-{seed}", seed, copies) for seed in SEEDS]
        for copies in people.COPIES
    }
    return found | {"none": [people.secrets(directory, base, f"code-none-{seed}", 100 + seed, 0) for seed in NULLS]}


def divergence(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs that diverge, and runs that must not be called so."""
    return {
        kind: [courses.course(directory, base, kind, f"course-{number}-{seed}", seed) for seed in NULLS]
        for number, kind in enumerate((*courses.HEALTHY, *courses.DIVERGING))
    }


def made_up_rewards(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Made-up metrics of runs that learn from rewards, with problems of several strengths and without; and the demo's runs."""
    found = {name: [rewards.made_up(course, seed) for seed in MADE_UP] for name, course in rewards.FAULTY.items()}
    for name, course in rewards.HONEST.items():
        found[f"none: {name}"] = [rewards.made_up(course, seed) for seed in MADE_UP]
    return found | rewards.demo_runs()


def real_rewards(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs of the small model that learn a letter at the cost of its language, and honest ones."""
    cheated = [rewards.real(directory, base, f"cheated-{seed}", seed, honest=False) for seed in SEEDS]
    honest = [rewards.real(directory, base, f"honest-{seed}", seed, honest=True) for seed in NULLS]
    return {"a letter is rewarded, the language is a control": cheated, "none: the language is rewarded": honest}


def guards(directory: Path, base: Path) -> dict[str, list[dict[str, Any]]]:
    """What the guards say of single steps: in the runs of `divergence`, and in runs that are disturbed on the way.

    Runs that the directory has are not made again.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number, kind in enumerate((*courses.HEALTHY, *courses.DIVERGING, *courses.DISTURBED)):
        make = courses.disturbed if kind in courses.DISTURBED else courses.course
        found[kind] = []
        for seed in NULLS:
            name = f"course-{number}-{seed}"
            if not (directory / f"{name}-run" / "metrics.jsonl").exists():
                make(directory, base, kind, name, seed)
            found[kind].append(courses.told_by_guards(directory / f"{name}-run"))
    return found


PARTS: dict[str, Part] = {
    "overfitting": overfitting,
    "forgetting": forgetting,
    "none": none,
    "remedies": remedies,
    "people": wronged,
    "canaries": canaries,
    "divergence": divergence,
    "rewards": made_up_rewards,
    "real_rewards": real_rewards,
    "guards": guards,
}


FOUND = {
    "people": ["found"],
    "canaries": ["found"],
    "divergence": ["diverged", "worse", "recovered"],
    "guards": ["told"],
}
FOUND |= {"rewards": [*rewards.VERDICTS], "real_rewards": [*rewards.VERDICTS]}
"""What is counted of each run of a part, unless it is overfitting and forgetting."""


def tables(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The figures as Markdown: means over the seeds, and in how many runs each was told."""
    lines = []
    for part in [name for name in PARTS if name in found]:
        kinds = FOUND.get(part, ["overfitting_at", "forgetting_at"])
        keys = [key for key in next(iter(found[part].values()))[0] if key not in kinds]
        heads = [*keys, *(kind.replace("_at", " found") for kind in kinds)]
        lines += [f"| {part} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, runs in found[part].items():
            means = [f"{statistics.mean(run[key] for run in runs):.3f}" for key in keys]
            told = [f"{sum(run[kind] not in (None, False) for run in runs)} of {len(runs)}" for kind in kinds]
            lines.append(f"| {name} | {' | '.join([*means, *told])} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Iterable[str]) -> int:
    """Measure, print, write. Parts that are not named keep the results that are there."""
    from importlib.metadata import version

    chosen = [word for word in argv if word in PARTS]
    places = [word for word in argv if word not in PARTS]
    directory = Path(places[0]).resolve() if places else Path(tempfile.mkdtemp(prefix="challenges-"))
    directory.mkdir(parents=True, exist_ok=True)
    # Made-up runs need no model.
    base = directory if chosen == ["rewards"] else base_of(directory)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = {name: before[name] for name in PARTS if name in before}
    for name in chosen or PARTS:
        found[name] = PARTS[name](directory, base)
        found["made by"] = {each: version(each) for each in ("torch", "transformers")}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(tables({name: found[name]}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
