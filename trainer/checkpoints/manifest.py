"""The manifest of a checkpoint: sizes and SHA-256 of its files, and a hash of itself.

A checkpoint is read only after every file was compared with the manifest, and the manifest with its own hash. A torn
file or a flipped bit is noticed wherever it is. The manifest does not say who made it: that reading is harmless is up
to the format (`strategies/tensor_files.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from strategies.atomic_io import RetryingReader, WrittenFile, file_difference, read_bytes, reason, write_new
from strategies.runtime import Runtime, broadcast_object, gather_objects, usable_cores
from strategies.saving import PROGRESS
from strategies.tensor_files import Malformed, is_count, parse_json, stays_in_directory
from trainer.checkpoints.layout import STEP_NAME, listed, places_of, published

MANIFEST = "manifest.json"
FORMAT = 2
MOST_MANIFEST = 2**26
"""Bytes of a manifest; more is not read."""
SHA256 = re.compile(r"[0-9a-f]{64}")
OTHERS = re.compile(r"\.nfs[0-9a-fA-F]+|\.DS_Store|\._.+|\.fuse_hidden[0-9a-fA-F]+|rank-\d{5}\.part\.json")
"""Names that NFS, macOS and FUSE put into a directory by themselves, and notes of ranks (`recovery.py`), which an old listing of
a network file system may still show. Nobody reads them."""
NO_MANIFEST = "has no manifest (its writing was interrupted)"
OF_OLD = ".metadata"
OLD = (
    "was written by an early version, in a format that can run code when it is read, so it is not read; export it with the "
    "version that wrote it, or train anew"
)


def seal(directory: Path, files: Iterable[WrittenFile]) -> None:
    """Write the manifest of a directory's files, durably. Errors: OSError."""
    write_new(directory / MANIFEST, _render({each.name: each for each in files}))


def _render(files: dict[str, WrittenFile]) -> bytes:
    rows = {name: {"bytes": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
    own = hashlib.sha256(json.dumps([FORMAT, rows]).encode()).hexdigest()
    return (json.dumps({"format": FORMAT, "sha256": own, "files": rows}, indent=1) + "\n").encode()


def read_manifest(directory: Path, looks: RetryingReader | None = None) -> list[WrittenFile]:
    """What the files of a sealed directory must be; `looks` read its manifest. Errors: Malformed, with what is wrong with it."""
    looks = looks or RetryingReader()
    try:
        present = set(listed(directory))
        if "state" in present and (directory / "state" / OF_OLD).exists():
            raise Malformed(OLD)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Malformed("is not a directory") from error
    except OSError as error:
        raise Malformed(f"cannot be read ({reason(error)})") from error
    if MANIFEST not in present:
        raise Malformed(OLD if OF_OLD in present else NO_MANIFEST)
    present.remove(MANIFEST)
    try:
        data = looks.read(directory / MANIFEST, lambda: read_bytes(directory / MANIFEST, most=MOST_MANIFEST))
        files = _parse(parse_json(data))
    except OSError as error:
        raise Malformed(f"cannot be read ({reason(error)})") from error
    except Malformed as error:
        raise Malformed("has a damaged manifest") from error
    if _render(files) != data:  # to the byte: what this program writes, and its own hash with it
        raise Malformed("has a damaged manifest")
    if beyond := sorted(name for name in present - set(files) if not OTHERS.fullmatch(name)):
        raise Malformed(f"holds files that are not in its manifest: {', '.join(beyond[:3])}")
    if missing := sorted(set(files) - present):
        raise Malformed(f"{missing[0]} is missing")
    return list(files.values())


def fingerprint(directory: Path) -> str | None:
    """The hash that a checkpoint's manifest has of itself, and so of all its files; None where there is none to be read."""
    try:
        found = parse_json(read_bytes(directory / MANIFEST, most=MOST_MANIFEST))
    except (OSError, Malformed):
        return None
    own = found.get("sha256") if isinstance(found, dict) else None
    return own if isinstance(own, str) and SHA256.fullmatch(own) else None


def artefact_of(run_dir: Path, step: int, fallback_dir: str | None) -> str | None:
    """The fingerprint of a run's checkpoint at a step; None where there is none. Errors: StorageError."""
    there = dict(published(places_of(run_dir, fallback_dir)))
    return fingerprint(there[step]) if step in there else None


def _parse(raw: object) -> dict[str, WrittenFile]:
    if not isinstance(raw, dict) or not isinstance(files := raw.get("files"), dict):
        raise Malformed("is no manifest")
    found = {}
    for name, row in files.items():
        known = isinstance(row, dict) and is_count(row.get("bytes")) and isinstance(row.get("sha256"), str)
        if not known or not stays_in_directory(name) or not SHA256.fullmatch(row["sha256"]):
            raise Malformed("is no manifest")
        found[name] = WrittenFile(name, row["bytes"], row["sha256"])
    return found


def verify(directory: Path, *, only: str | None = None, may_be_deleted: bool = False) -> str | None:
    """What is wrong with a sealed directory (or with its file `only`), None where nothing is. Reads all of it.

    `may_be_deleted`: this process has listed it, so that a file which is not there is not one that is yet to appear: if the
    directory is gone, nobody waits for it.
    """
    looks = RetryingReader(lambda text: print(text, flush=True), lambda: may_be_deleted and not directory.exists())
    try:
        files = read_manifest(directory, looks)
    except Malformed as error:
        return str(error)
    if only is not None:
        files = [each for each in files if each.name == only]
    return _first_difference(directory, files, usable_cores(), looks) or _another_step(directory)


def verify_together(directory: Path, runtime: Runtime) -> str | None:
    """`verify`, with the files dealt to the ranks by size; the same answer on every rank. All ranks must call."""
    found: tuple[str | None, list[WrittenFile]] = (None, [])
    if runtime.is_main:
        try:
            found = (None, read_manifest(directory))
        except Malformed as error:
            found = (str(error), [])
    problem, files = broadcast_object(found, runtime)
    if problem is None:
        problem = _first_difference(directory, _share(files, runtime), usable_cores() // runtime.local_world_size)
    if problem is None and runtime.is_main:
        problem = _another_step(directory)
    return next((each for each in gather_objects(problem, runtime) if each), None)


def _another_step(directory: Path) -> str | None:
    """That a checkpoint is named for another step than it is of, as a copy is that somebody renamed; None where it is not."""
    name = STEP_NAME.fullmatch(directory.name)
    if name is None:
        return None
    try:
        about = parse_json(read_bytes(directory / PROGRESS, most=MOST_MANIFEST))
        step = about["progress"]["step"]
    except (OSError, Malformed, KeyError, TypeError):
        return None  # which whoever reads it finds out
    return None if step == int(name[1]) else f"is a checkpoint of step {step} under another name"


def _share(files: list[WrittenFile], runtime: Runtime) -> list[WrittenFile]:
    """This rank's files, of which every rank gets about as many bytes."""
    loads = [0] * runtime.world_size
    mine = []
    for each in sorted(files, key=lambda file: (-file.size, file.name)):
        rank = loads.index(min(loads))
        loads[rank] += each.size
        if rank == runtime.rank:
            mine.append(each)
    return mine


def _first_difference(
    directory: Path, files: list[WrittenFile], threads: int, looks: RetryingReader | None = None
) -> str | None:
    looks = looks or RetryingReader(lambda text: print(text, flush=True))
    with ThreadPoolExecutor(max(1, min(threads, len(files), 8))) as pool:
        return next(filter(None, pool.map(lambda each: file_difference(directory, each, looks), files)), None)
