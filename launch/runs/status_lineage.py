"""`shardtune status <directory> document=<file>:<line>` or `text=<piece>`: the runs that trained on a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.output import fold, fold_all
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.data_lineage import DocumentExposure, DocumentQuery
    from trainer.config.run import RunConfig

FILE_AND_LINE = re.compile(r"(?P<file>.+):(?P<line>[0-9]+)")
"""The form `<file>:<line>` of `document=`."""


def main(root: Path, document: str | None, piece: str | None, *, as_json: bool) -> int:
    """Print which runs below `root` were trained on a document; returns the exit code, 0. Errors: ConfigError.

    The document is named by `document`, as in `train.jsonl:12`, or by `piece`, a piece of its text.
    """
    from launch.runs.data_lineage import DocumentQuery, document_exposures
    from launch.runs.status import find_runs

    query = DocumentQuery(text=piece)
    if document is not None:
        match = FILE_AND_LINE.fullmatch(document)
        assert match is not None  # `status_arguments` refuses other forms
        query = DocumentQuery(file=match["file"], line=int(match["line"]))
    try:
        runs = find_runs(root).runs
    except OSError as error:
        raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
    exposures = document_exposures([(run, _load_config(run)) for run in runs], query)
    if as_json:
        print(json.dumps(lineage_as_dict(query, exposures), indent=1))
    else:
        print(lineage_text(root, query, exposures))
    return 0


def _load_config(run: Path) -> RunConfig | str:
    """The frozen configuration of a run, or a line that says why it cannot be read."""
    from launch.config.frozen import load_frozen

    try:
        return load_frozen(run / "config.yaml")
    except (ConfigError, OSError) as error:
        return " ".join(str(error).split())


def lineage_text(root: Path, query: DocumentQuery, exposures: list[DocumentExposure]) -> str:
    """What `status document=` prints: each run that has the document, those of which it is not known, and what to do."""
    exposed = [exposure for exposure in exposures if exposure.trained or exposure.documents]
    unknown = [exposure for exposure in exposures if exposure.why_unknown is not None and not exposure.trained]
    if exposed:
        lines = [f"{query}: in {len(exposed)} of {len(exposures)} runs below {root}"]
        lines += fold_all([f"{exposure.run}: {_exposure_sentence(exposure)}" for exposure in exposed])
    else:
        lines = [f"{query}: in no run below {root}"]
    if unknown:
        lines.append(f"not known for {len(unknown)}:")
        lines += fold_all([f"{exposure.run}: {exposure.why_unknown}" for exposure in unknown])
    if any(exposure.trained for exposure in exposed):
        lines += fold(
            "weights that were trained on it, and copies of them elsewhere, keep what they learned: train anew without it"
        )
    return "\n".join(lines)


def _exposure_sentence(exposure: DocumentExposure) -> str:
    """A sentence on one run: how often it trained on the document, whether it holds it out, and which earlier run saw it."""
    trained_on = exposure.documents.get("train", 0)
    held_out = sum(count for split, count in exposure.documents.items() if split != "train")
    in_training_data = f"{trained_on} documents of its training data" if trained_on > 1 else "in its training data"
    clauses = []
    if exposure.times_trained:
        how_often = "once" if exposure.times_trained == 1 else f"{exposure.times_trained} times"
        clauses.append(f"{in_training_data}, trained on {how_often} by step {exposure.step}")
    elif trained_on:
        clauses.append(f"{in_training_data}, but not trained on by step {exposure.step}")
    if held_out == 1:
        clauses.append("held out, evaluated on alone")
    elif held_out:
        clauses.append(f"{held_out} held out, evaluated on alone")
    if exposure.earlier_run is not None:
        clauses.append(f"began with the weights of {exposure.earlier_run}")
    if exposure.shown_documents and (trained_on > 1 or held_out > 1):
        more = " ..." if trained_on + held_out > len(exposure.shown_documents) else ""
        clauses.append(f"{', '.join(exposure.shown_documents)}{more}")
    return "; ".join(clauses)


def lineage_as_dict(query: DocumentQuery, exposures: list[DocumentExposure]) -> dict[str, Any]:
    """What `status document= --json` prints: every run that was searched; `trained` is null if it cannot be told."""
    runs = []
    for exposure in exposures:
        trained: bool | None = exposure.trained
        if exposure.why_unknown is not None and not exposure.trained:
            trained = None
        runs.append(
            {
                "run": str(exposure.run),
                "trained": trained,
                "times": exposure.times_trained,
                "step": exposure.step,
                "documents": exposure.documents,
                "where": list(exposure.shown_documents),
                "through": None if exposure.earlier_run is None else str(exposure.earlier_run),
                "unknown": exposure.why_unknown,
            }
        )
    return {"document": str(query), "runs": runs}
