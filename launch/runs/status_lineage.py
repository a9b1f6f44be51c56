"""`shardtune status <directory> document=<file>:<line>` or `text=<piece>`: the runs that trained on a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.output import fold, fold_all
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.data_lineage import DocumentQuery, Sighting
    from trainer.config.run import RunConfig

DOCUMENT_PLACE = re.compile(r"(?P<file>.+):(?P<line>[0-9]+)")
"""`<file>:<line>`, what `document=` takes."""


def main(root: Path, document: str | None, piece: str | None, *, as_json: bool) -> int:
    """Look for a document by its `DOCUMENT_PLACE`, or for a piece of text, and print what each run has of it; returns 0.

    Errors: ConfigError.
    """
    from launch.runs.data_lineage import DocumentQuery, sightings
    from launch.runs.status import find_runs

    query = DocumentQuery(text=piece)
    if document is not None and (place := DOCUMENT_PLACE.fullmatch(document)) is not None:
        query = DocumentQuery(file=place["file"], line=int(place["line"]))
    try:
        runs = find_runs(root).runs
    except OSError as error:
        raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
    results = sightings([(run, _config(run)) for run in runs], query)
    print(json.dumps(as_dict(query, results), indent=1) if as_json else text(root, query, results))
    return 0


def _config(run: Path) -> RunConfig | str:
    from launch.config.frozen import load_frozen

    try:
        return load_frozen(run / "config.yaml")
    except (ConfigError, OSError) as error:
        return " ".join(str(error).split())


def text(root: Path, query: DocumentQuery, sightings: list[Sighting]) -> str:
    """The page for people."""
    saw = [sighting for sighting in sightings if sighting.trained or sighting.documents]
    unknown = [sighting for sighting in sightings if sighting.unknown is not None and not sighting.trained]
    if saw:
        lines = [f"{query}: in {len(saw)} of {len(sightings)} runs below {root}"]
        lines += fold_all([f"{sighting.run}: {_what_it_saw(sighting)}" for sighting in saw])
    else:
        lines = [f"{query}: in no run below {root}"]
    if unknown:
        lines.append(f"not known for {len(unknown)}:")
        lines += fold_all([f"{sighting.run}: {sighting.unknown}" for sighting in unknown])
    if any(sighting.trained for sighting in saw):
        lines += fold(
            "weights that were trained on it, and copies of them elsewhere, keep what they learned: train anew without it"
        )
    return "\n".join(lines)


def _what_it_saw(sighting: Sighting) -> str:
    """How often a run trained on the document, whether it holds it out, and which run's weights brought it."""
    trained_on = sighting.documents.get("train", 0)
    held_out = sum(number for split, number in sighting.documents.items() if split != "train")
    several = f"{trained_on} documents of its training data" if trained_on > 1 else "in its training data"
    parts = []
    if sighting.times:
        often = "once" if sighting.times == 1 else f"{sighting.times} times"
        parts.append(f"{several}, trained on {often} by step {sighting.step}")
    elif trained_on:
        parts.append(f"{several}, but not trained on by step {sighting.step}")
    if held_out:
        parts.append(f"{held_out} held out, evaluated on alone" if held_out > 1 else "held out, evaluated on alone")
    if sighting.through is not None:
        parts.append(f"began with the weights of {sighting.through}")
    if sighting.where and (trained_on > 1 or held_out > 1):
        more = " ..." if trained_on + held_out > len(sighting.where) else ""
        parts.append(f"{', '.join(sighting.where)}{more}")
    return "; ".join(parts)


def as_dict(query: DocumentQuery, sightings: list[Sighting]) -> dict[str, Any]:
    """For scripts: every run that was looked at."""
    runs = []
    for sighting in sightings:
        trained: bool | None = sighting.trained
        if sighting.unknown is not None and not sighting.trained:
            trained = None  # not known
        runs.append(
            {
                "run": str(sighting.run),
                "trained": trained,
                "times": sighting.times,
                "step": sighting.step,
                "documents": sighting.documents,
                "where": list(sighting.where),
                "through": None if sighting.through is None else str(sighting.through),
                "unknown": sighting.unknown,
            }
        )
    return {"document": str(query), "runs": runs}
