"""`shardtune status <directory> document=<file>:<line>`, or `text=<piece>`: which runs have seen a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.data_lineage import DocumentQuery, Sighting
    from trainer.config.run import RunConfig

PLACE = re.compile(r"(?P<file>.+):(?P<line>[0-9]+)")
"""`<file>:<line>`, what `document=` takes."""


def main(root: Path, document: str | None, piece: str | None, *, as_json: bool) -> int:
    """Look for a document by its `PLACE`, or for a piece of text, and print what each run has of it; returns 0.

    Errors: ConfigError.
    """
    from launch.runs.data_lineage import DocumentQuery, sightings
    from launch.runs.status import find

    wanted = DocumentQuery(text=piece)
    if document is not None and (place := PLACE.fullmatch(document)) is not None:
        wanted = DocumentQuery(file=place["file"], line=int(place["line"]))
    try:
        runs = find(root).runs
    except OSError as error:
        raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
    found = sightings([(run, _config(run)) for run in runs], wanted)
    print(json.dumps(as_dict(wanted, found), indent=1) if as_json else text(root, wanted, found))
    return 0


def _config(run: Path) -> RunConfig | str:
    from launch.config.frozen import load_frozen

    try:
        return load_frozen(run / "config.yaml")
    except (ConfigError, OSError) as error:
        return " ".join(str(error).split())


def text(root: Path, wanted: DocumentQuery, found: list[Sighting]) -> str:
    """For people."""
    saw = [each for each in found if each.trained or each.documents]
    unknown = [each for each in found if each.unknown is not None and not each.trained]
    width = max((len(str(each.run)) for each in (*saw, *unknown)), default=0)
    lines = [
        f"{wanted}: in {len(saw)} of {len(found)} runs below {root}" if saw else f"{wanted}: in no run below {root}"
    ]
    lines += [f"  {each.run!s:<{width}}  {_says(each)}" for each in saw]
    if unknown:
        lines.append(f"of {len(unknown)} it cannot be told:")
        lines += [f"  {each.run!s:<{width}}  {each.unknown}" for each in unknown]
    if any(each.trained for each in saw):
        lines.append(
            "weights that were trained on it, and copies of them elsewhere, keep what they learned: train anew without it"
        )
    return "\n".join(lines)


def _says(one: Sighting) -> str:
    count = one.documents.get("train", 0)
    several = f"{count} documents of its training data" if count > 1 else "in its training data"
    parts = []
    if one.times:
        parts.append(
            f"{several}, trained on {one.times} times by step {one.step}"
            if one.times > 1
            else f"{several}, trained on once by step {one.step}"
        )
    elif count:
        parts.append(f"{several}, but not trained on by step {one.step}")
    held = sum(number for split, number in one.documents.items() if split != "train")
    if held:
        parts.append(f"{held} held out, evaluated on alone" if held > 1 else "held out, evaluated on alone")
    if one.through is not None:
        parts.append(f"began with the weights of {one.through}")
    if one.where and (count > 1 or held > 1):
        parts.append(", ".join(one.where) + (" ..." if count + held > len(one.where) else ""))
    return "; ".join(parts)


def as_dict(wanted: DocumentQuery, found: list[Sighting]) -> dict[str, Any]:
    """For scripts: every run that was looked at."""
    return {
        "document": str(wanted),
        "runs": [
            {
                "run": str(each.run),
                "trained": each.trained if each.unknown is None or each.trained else None,
                "times": each.times,
                "step": each.step,
                "documents": each.documents,
                "where": list(each.where),
                "through": None if each.through is None else str(each.through),
                "unknown": each.unknown,
            }
            for each in found
        ],
    }
