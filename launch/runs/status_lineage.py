"""`shardtune status <directory> document=<file>:<line>` or `text=<piece>`: the runs that trained on a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.output import wrap_sentences, wrap_text
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.data_lineage import DocumentExposure, DocumentQuery
    from trainer.config.run import RunConfig

FILE_AND_LINE_REGEX = re.compile(r"(?P<file>.+):(?P<line>[0-9]+)")
"""The form `<file>:<line>` of `document=`."""


def print_document_lineage(root: Path, document: str | None, text_piece: str | None, *, as_json: bool) -> int:
    """Print which runs below `root` were trained on a document that must be deleted, for example; returns the exit code, 0.

    The document is named by `document`, as in `train.jsonl:12`, or by `text_piece`, a piece of its text. Raises ConfigError
    if `root` cannot be listed.
    """
    from launch.runs.data_lineage import DocumentQuery, document_exposures
    from launch.runs.status import find_runs

    query = DocumentQuery(text=text_piece)
    if document is not None:
        match = FILE_AND_LINE_REGEX.fullmatch(document)
        assert match is not None  # `status_arguments` refuses other forms
        query = DocumentQuery(file=match["file"], line=int(match["line"]))
    try:
        runs = find_runs(root).runs
    except OSError as error:
        raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
    exposures = document_exposures([(run, _load_config_or_reason(run)) for run in runs], query)
    if as_json:
        print(json.dumps(lineage_as_dict(query, exposures), indent=1))
    else:
        print(lineage_text(root, query, exposures))
    return 0


def _load_config_or_reason(run_dir: Path) -> RunConfig | str:
    """The frozen configuration of a run or, if it cannot be read, a line that says why."""
    from launch.config.frozen import load_frozen_config

    try:
        return load_frozen_config(run_dir / "config.yaml")
    except (ConfigError, OSError) as error:
        return " ".join(str(error).split())


def lineage_text(root: Path, query: DocumentQuery, exposures: list[DocumentExposure]) -> str:
    """Write what `status document=` prints: which runs have the document or learned from it, and what to do about their weights.

    Runs of which this is not known are listed with the reason.
    """
    # Runs whose prepared data has the document count too, although training may not have reached it.
    with_document = [exposure for exposure in exposures if exposure.was_trained_on or exposure.num_documents_by_split]
    unknown = [exposure for exposure in exposures if exposure.why_unknown is not None and not exposure.was_trained_on]
    if with_document:
        lines = [f"{query}: in {len(with_document)} of {len(exposures)} runs below {root}"]
        lines += wrap_sentences([f"{exposure.run}: {_exposure_sentence(exposure)}" for exposure in with_document])
    else:
        lines = [f"{query}: in no run below {root}"]
    if unknown:
        lines.append(f"not known for {len(unknown)}:")
        lines += wrap_sentences([f"{exposure.run}: {exposure.why_unknown}" for exposure in unknown])
    if any(exposure.was_trained_on for exposure in with_document):
        lines += wrap_text(
            "weights that were trained on it, and copies of them elsewhere, keep what they learned: train anew without it"
        )
    return "\n".join(lines)


def _exposure_sentence(exposure: DocumentExposure) -> str:
    """Say how one run met the documents: `in its training data, trained on 2 times by step 40; ...`.

    Held-out documents are evaluated on and not trained on. If there are several documents, the first of them are named at
    its end.
    """
    num_training = exposure.num_documents_by_split.get("train", 0)
    num_held_out = sum(exposure.num_documents_by_split.values()) - num_training
    in_training_data = "in its training data"
    if num_training > 1:
        in_training_data = f"{num_training} documents of its training data"
    clauses = []
    if exposure.times_trained:
        how_often = "once" if exposure.times_trained == 1 else f"{exposure.times_trained} times"
        clauses.append(f"{in_training_data}, trained on {how_often} by step {exposure.step}")
    elif num_training:
        clauses.append(f"{in_training_data}, but not trained on by step {exposure.step}")
    if num_held_out == 1:
        clauses.append("held out, evaluated on alone")
    elif num_held_out:
        clauses.append(f"{num_held_out} held out, evaluated on alone")
    if exposure.earlier_run is not None:
        clauses.append(f"began with the weights of {exposure.earlier_run}")
    if exposure.shown_documents and (num_training > 1 or num_held_out > 1):
        more = " ..." if num_training + num_held_out > len(exposure.shown_documents) else ""
        clauses.append(f"{', '.join(exposure.shown_documents)}{more}")
    return "; ".join(clauses)


def lineage_as_dict(query: DocumentQuery, exposures: list[DocumentExposure]) -> dict[str, Any]:
    """The JSON value that `status document= --json` prints: every run, and whether it was trained on the document.

    `trained` is null if it cannot be told. `through` names an earlier run whose weights it began with.
    """
    runs = []
    for exposure in exposures:
        was_trained_on: bool | None = exposure.was_trained_on
        if exposure.why_unknown is not None and not exposure.was_trained_on:
            was_trained_on = None
        runs.append(
            {
                "run": str(exposure.run),
                "trained": was_trained_on,
                "times": exposure.times_trained,
                "step": exposure.step,
                "documents": exposure.num_documents_by_split,
                "where": list(exposure.shown_documents),
                "through": None if exposure.earlier_run is None else str(exposure.earlier_run),
                "unknown": exposure.why_unknown,
            }
        )
    return {"document": str(query), "runs": runs}
