"""Publishes a checkpoint that was complete when the run failed, but not published yet.

The thread that writes a rank's file also writes a note beside it: what the file is and where each tensor lies
(`rank-00000.part.json`). If all ranks have left such a note, the next start can publish the checkpoint. It is then read
like any other: every file is compared with its hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.atomic_io import WrittenFile, error_summary, publish, write_new
from strategies.saving import PROGRESS, FileOutcome, RankState
from strategies.tensor_files import INDEX, FilePart, Malformed, index_json, parse_json
from trainer.checkpoints.layout import STEP_DIR, names_in, published
from trainer.checkpoints.manifest import write_manifest

NOTE = "rank-{:05d}.part.json"
STAGING_NAME = re.compile(r"\.step-(\d{1,15})\.writing")
MAX_NOTE_BYTES = 2**30
"""Bytes of a note; more is not read."""


@dataclass(frozen=True, slots=True)
class PartNote:
    """What one rank has written of a checkpoint."""

    world_size: int
    parts: dict[str, FilePart]
    """Where each tensor of the rank lies."""
    file: WrittenFile | None
    """None if the rank holds nothing that is written."""
    progress: str
    """What becomes `progress.json`."""


def note_part(staging: Path, state: RankState, outcome: FileOutcome) -> None:
    """Write the note of what this rank has written into `staging`, durably. No collective. Errors: OSError."""
    parts = {}
    for name, part in state.parts.items():
        parts[name] = [part.file, part.start, part.length, part.offset]
    file = None
    if outcome.written is not None:
        file = [outcome.written.name, outcome.written.size, outcome.written.sha256]
    note = {
        "world_size": state.runtime.world_size,
        "parts": parts,
        "file": file,
        "progress": state.header.decode(),
    }
    write_new(staging / NOTE.format(state.runtime.rank), json.dumps(note).encode())


def forget_notes(staging: Path, world_size: int) -> None:
    """Remove the notes of all ranks from a checkpoint that is about to be published. Errors: OSError."""
    for rank in range(world_size):
        (staging / NOTE.format(rank)).unlink(missing_ok=True)


def recover(places: list[Path], print_line: Callable[[str], None]) -> None:
    """Publish a checkpoint that all ranks had written when the last attempt failed. Only the owner of the run may call.

    No collective.
    """
    newest = max((step for step, _ in published(places)), default=-1)
    for place in places:
        for name in names_in(place):
            staging_name = STAGING_NAME.fullmatch(name)
            if staging_name is None or int(staging_name[1]) <= newest:
                continue
            final = STEP_DIR.format(int(staging_name[1]))
            try:
                if _publish(place / name, place / final):
                    print_line(f"checkpoint {final}: all of it was written when the run ended; it is published now")
            # A note of another form, too, is no reason not to start.
            except (OSError, ValueError, TypeError, AttributeError) as error:
                print_line(f"warning: {place / name}: could not be made a checkpoint ({error_summary(error)})")


def _publish(aside: Path, final: Path) -> bool:
    """Whether the directory had all that a checkpoint needs, and is one now. Errors: OSError, Malformed."""
    notes = _read_notes(aside)
    if not notes or len(notes) != notes[0].world_size:
        return False
    files = [note.file for note in notes if note.file is not None]
    files.append(write_new(aside / INDEX, index_json(note.parts for note in notes)))
    files.append(write_new(aside / PROGRESS, notes[0].progress.encode()))
    write_manifest(aside, files)
    forget_notes(aside, len(notes))
    publish(aside, final)
    return True


def _read_notes(aside: Path) -> list[PartNote]:
    """The notes of the ranks, as far as they follow each other from rank 0 on. Errors: OSError, Malformed."""
    notes: list[PartNote] = []
    while (path := aside / NOTE.format(len(notes))).exists():
        raw: Any = parse_json(atomic_io.read_bytes(path, most=MAX_NOTE_BYTES))
        try:
            parts = {str(name): FilePart(*part) for name, part in raw["parts"].items()}
            file = None if raw["file"] is None else WrittenFile(*raw["file"])
            notes.append(PartNote(raw["world_size"], parts, file, raw["progress"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise Malformed(f"{path.name} is no note of a rank") from error
    return notes
