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
from strategies.atomic_io import WrittenFile, error_summary, publish_directory, write_new_file
from strategies.saving import PROGRESS_FILE, RankFileOutcome, RankState
from strategies.tensor_files import INDEX_FILE, FilePart, MalformedFile, index_json, parse_json
from trainer.checkpoints.layout import STEP_DIR_FORMAT, checkpoints_in, list_directory_if_present
from trainer.checkpoints.manifest import write_manifest

PART_NOTE_FILE_FORMAT = "rank-{:05d}.part.json"
"""Note of a rank about the file that it has written, such as `rank-00003.part.json`."""
STAGING_DIR_REGEX = re.compile(r"\.step-(\d{1,15})\.writing")
MAX_NOTE_BYTES = 2**30
"""Bytes of a note; more is not read."""


@dataclass(frozen=True, slots=True)
class PartNote:
    """What one rank has written of a checkpoint."""

    world_size: int
    part_by_tensor: dict[str, FilePart]
    """Where each tensor of the rank lies."""
    tensor_file: WrittenFile | None
    """None if the rank holds nothing that is written."""
    progress_json: str
    """What becomes `progress.json`."""
    attached: list[WrittenFile]
    """What was written beside it, see `RankState.attachments`."""


def write_part_note(staging_dir: Path, state: RankState, outcome: RankFileOutcome) -> None:
    """Note beside this rank's file of a checkpoint what it holds, so that a start after a crash can publish the checkpoint.

    `staging_dir`: the directory of the unfinished checkpoint. `state`: this rank's part of the training state. `outcome`: what
    was written of it. Durable when it returns. No collective. Raises OSError if that fails.
    """
    part_fields_by_tensor = {}
    for name, part in state.part_by_tensor.items():
        part_fields_by_tensor[name] = [part.file, part.start, part.length, part.offset]
    file_fields = None  # stays None if this rank holds nothing that is written
    if outcome.written is not None:
        file_fields = [outcome.written.name, outcome.written.size, outcome.written.sha256]
    note = {
        "world_size": state.runtime.world_size,
        "parts": part_fields_by_tensor,
        "file": file_fields,
        "progress": state.progress_json.decode(),
        "attached": [[attached.name, attached.size, attached.sha256] for attached in outcome.attached],
    }
    write_new_file(staging_dir / PART_NOTE_FILE_FORMAT.format(state.runtime.rank), json.dumps(note).encode())


def remove_part_notes(staging_dir: Path, world_size: int) -> None:
    """Remove the notes by which a start after a crash would publish a checkpoint, since it is about to be published now.

    Raises OSError if that fails.
    """
    for rank in range(world_size):
        (staging_dir / PART_NOTE_FILE_FORMAT.format(rank)).unlink(missing_ok=True)


def publish_complete_staging_dirs(checkpoint_dirs: list[Path], print_line: Callable[[str], None]) -> None:
    """Publish checkpoints that were complete when the last attempt at the run failed, but had not got their names yet.

    Called at a start, so that the run resumes from them. Such a checkpoint is in a staging directory, as `.step-000040.writing`,
    and is renamed to `step-000040`. Those of a step up to the newest published one are left alone. One that cannot be published
    is reported, and left alone too. Only the owner of the run directory may call. No collective.
    """
    newest_step = max((checkpoint.step for checkpoint in checkpoints_in(checkpoint_dirs)), default=-1)
    for checkpoint_dir in checkpoint_dirs:
        for name in list_directory_if_present(checkpoint_dir):
            staging_match = STAGING_DIR_REGEX.fullmatch(name)
            if staging_match is None or int(staging_match[1]) <= newest_step:
                continue
            named_dir = STEP_DIR_FORMAT.format(int(staging_match[1]))
            try:
                if _publish_if_complete(checkpoint_dir / name, checkpoint_dir / named_dir):
                    print_line(f"checkpoint {named_dir}: all of it was written when the run ended; it is published now")
            # Also errors of a rank's note that is unreadable or of another form: it must not keep the run from starting.
            except (OSError, ValueError, TypeError, AttributeError) as error:
                print_line(f"warning: {checkpoint_dir / name}: could not be made a checkpoint ({error_summary(error)})")


def _publish_if_complete(staging_dir: Path, named_dir: Path) -> bool:
    """Finish a checkpoint in its staging directory and rename it to `named_dir`, if every rank had written its part.

    Each rank leaves a note of what it has written. From the notes come the files that rank 0 would have written: index,
    progress and manifest. Returns whether the checkpoint was complete. Raises OSError or MalformedFile if that fails.
    """
    notes = _read_part_notes(staging_dir)
    is_complete = bool(notes) and len(notes) == notes[0].world_size  # a note of each rank
    if not is_complete:
        return False
    files = [note.tensor_file for note in notes if note.tensor_file is not None]
    for note in notes:
        files += note.attached
    # `write_new_file` returns name, size and hash of the file, for the manifest. All ranks have noted the same progress; their
    # notes together say where each tensor lies.
    files.append(write_new_file(staging_dir / INDEX_FILE, index_json(note.part_by_tensor for note in notes)))
    files.append(write_new_file(staging_dir / PROGRESS_FILE, notes[0].progress_json.encode()))
    write_manifest(staging_dir, files)
    remove_part_notes(staging_dir, len(notes))
    publish_directory(staging_dir, named_dir)
    return True


def _read_part_notes(staging_dir: Path) -> list[PartNote]:
    """Read the notes in which each rank says what it has written of a checkpoint: from rank 0 up to the first missing one.

    `staging_dir`: the directory of the unfinished checkpoint, such as `checkpoints/.step-000040.writing`. Raises OSError if a
    note cannot be read, MalformedFile if it has another form than `write_part_note` writes.
    """
    notes: list[PartNote] = []
    while (path := staging_dir / PART_NOTE_FILE_FORMAT.format(len(notes))).exists():
        note_json: Any = parse_json(atomic_io.read_bytes(path, max_bytes=MAX_NOTE_BYTES))
        try:
            notes.append(_part_note_from_json(note_json))
        except (KeyError, TypeError, AttributeError) as error:
            raise MalformedFile(f"{path.name} is no note of a rank") from error
    return notes


def _part_note_from_json(note_json: Any) -> PartNote:
    """Parse the note in which a rank says what it has written of a checkpoint, as `write_part_note` wrote it.

    `note_json`: {"world_size": 4, "parts": {"h.0.attn.weight/exp_avg": ["rank-00003.safetensors", 0, 4096, 512]}, "file":
    ["rank-00003.safetensors", 16896, "<SHA-256>"], "progress": "<JSON>", "attached": []}. "file" is null for a rank without
    tensors. Raises KeyError, TypeError or AttributeError for anything else.
    """
    # Rows have the fields of `FilePart` and `WrittenFile` in their order.
    file_row = note_json["file"]
    part_by_tensor = {str(name): FilePart(*part_row) for name, part_row in note_json["parts"].items()}
    attached = [WrittenFile(*written_row) for written_row in note_json.get("attached", ())]
    return PartNote(
        world_size=note_json["world_size"],
        part_by_tensor=part_by_tensor,
        tensor_file=None if file_row is None else WrittenFile(*file_row),
        progress_json=note_json["progress"],
        attached=attached,
    )
