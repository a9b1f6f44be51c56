"""The manifest of a checkpoint: sizes and SHA-256 of its files, and a hash of itself.

A checkpoint is read only after every file was compared with the manifest, and the manifest with its own hash. So a torn
file or a flipped bit is noticed wherever it is. The manifest does not say who made it: it is the file format
(`strategies/tensor_files.py`) that makes reading a foreign checkpoint harmless.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from strategies.atomic_io import RetryingReader, WrittenFile, error_summary, file_difference, read_bytes, write_new_file
from strategies.runtime import Runtime, broadcast_object, gather_objects, num_usable_cores
from strategies.saving import PROGRESS_FILE
from strategies.tensor_files import MalformedFile, is_count, parse_json, stays_in_directory
from trainer.checkpoints.layout import STEP_DIR_REGEX, checkpoint_dirs_of, checkpoints_in, list_directory

MANIFEST_FILE = "manifest.json"
FORMAT = 2
MAX_THREADS = 8
"""Files of a checkpoint that are read at a time: more do not make a disk faster."""
MAX_MANIFEST_BYTES = 2**26
"""Bytes of a manifest; more is not read."""
SHA256_REGEX = re.compile(r"[0-9a-f]{64}")
IGNORED_NAMES_REGEX = re.compile(r"\.nfs[0-9a-fA-F]+|\.DS_Store|\._.+|\.fuse_hidden[0-9a-fA-F]+|rank-\d{5}\.part\.json")
"""Names that NFS, macOS and FUSE put into a directory by themselves, and notes of ranks (`recovery.py`), which an old listing of
a network file system may still show. Nobody reads them."""
MISSING_MANIFEST_REASON = "has no manifest (its writing was interrupted)"
OLD_FORMAT_METADATA_FILE = ".metadata"
OLD_FORMAT_REASON = (
    "was written by an early version, in a format that can run code when it is read, so it is not read; export it with the "
    "version that wrote it, or train anew"
)


def write_manifest(directory: Path, files: Iterable[WrittenFile]) -> None:
    """Write the manifest of a directory's files, durably. Raises OSError if that fails."""
    write_new_file(directory / MANIFEST_FILE, _manifest_bytes({file.name: file for file in files}))


def _manifest_bytes(files: dict[str, WrittenFile]) -> bytes:
    """The bytes of a manifest for these files, by name: their sizes and hashes, and the hash of all that."""
    entries = {}
    for name in sorted(files):
        entries[name] = {"bytes": files[name].size, "sha256": files[name].sha256}
    own_sha256 = hashlib.sha256(json.dumps([FORMAT, entries]).encode()).hexdigest()
    manifest = {"format": FORMAT, "sha256": own_sha256, "files": entries}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def read_manifest(directory: Path, reader: RetryingReader | None = None) -> list[WrittenFile]:
    """Read and check the manifest of a checkpoint: name, size and SHA-256 that each of its files must have.

    The files themselves are only looked for, not read. `reader`: that of the checkpoint, which waits for a disk that stumbles.
    Raises MalformedFile, with what is wrong with the directory or its manifest.
    """
    present_names = _names_beside_manifest(directory)
    files = _read_manifest_file(directory / MANIFEST_FILE, reader or RetryingReader())
    extra_names = sorted(name for name in present_names - set(files) if not IGNORED_NAMES_REGEX.fullmatch(name))
    if extra_names:
        raise MalformedFile(f"holds files that are not in its manifest: {', '.join(extra_names[:3])}")
    missing_names = sorted(set(files) - present_names)
    if missing_names:
        raise MalformedFile(f"{missing_names[0]} is missing")
    return list(files.values())


def _names_beside_manifest(directory: Path) -> set[str]:
    """The names in a checkpoint's directory, without the manifest's.

    Raises MalformedFile if the directory cannot be listed, has no manifest, or holds a checkpoint of an early version.
    """
    try:
        present_names = set(list_directory(directory))
        if "state" in present_names and (directory / "state" / OLD_FORMAT_METADATA_FILE).exists():
            raise MalformedFile(OLD_FORMAT_REASON)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MalformedFile("is not a directory") from error
    except OSError as error:
        raise MalformedFile(f"cannot be read ({error_summary(error)})") from error
    if MANIFEST_FILE not in present_names:
        raise MalformedFile(OLD_FORMAT_REASON if OLD_FORMAT_METADATA_FILE in present_names else MISSING_MANIFEST_REASON)
    return present_names - {MANIFEST_FILE}


def _read_manifest_file(path: Path, reader: RetryingReader) -> dict[str, WrittenFile]:
    """The files that a manifest lists, by name. Raises MalformedFile if it cannot be read or is damaged."""
    try:
        manifest_bytes = reader.read_with_retries(path, lambda: read_bytes(path, max_bytes=MAX_MANIFEST_BYTES))
        files = _files_by_name_of_manifest(parse_json(manifest_bytes))
    except OSError as error:
        raise MalformedFile(f"cannot be read ({error_summary(error)})") from error
    except MalformedFile as error:
        raise MalformedFile("has a damaged manifest") from error
    if _manifest_bytes(files) != manifest_bytes:  # equal to the byte, so the manifest's hash of itself is right too
        raise MalformedFile("has a damaged manifest")
    return files


def manifest_sha256(directory: Path) -> str | None:
    """The SHA-256 in a checkpoint's manifest, which covers all entries of the manifest and so all files; None if unreadable."""
    try:
        manifest = parse_json(read_bytes(directory / MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES))
    except (OSError, MalformedFile):
        return None
    if not isinstance(manifest, dict):
        return None
    own_sha256 = manifest.get("sha256")
    if not isinstance(own_sha256, str) or not SHA256_REGEX.fullmatch(own_sha256):
        return None
    return own_sha256


def manifest_sha256_at_step(run_dir: Path, step: int, fallback_dir: str | None) -> str | None:
    """The fingerprint of a run's checkpoint at a step; None if there is none. Raises StorageError if that fails."""
    checkpoints = dict(checkpoints_in(checkpoint_dirs_of(run_dir, fallback_dir)))
    if step not in checkpoints:
        return None
    return manifest_sha256(checkpoints[step])


def _files_by_name_of_manifest(manifest_json: object) -> dict[str, WrittenFile]:
    """The files that a checkpoint's manifest lists, by name, with size and SHA-256.

    `manifest_json`: the manifest's parsed JSON. Raises MalformedFile if it has another form than `_manifest_bytes` writes:
    anybody may have written the file.
    """
    rows = manifest_json.get("files") if isinstance(manifest_json, dict) else None
    if not isinstance(rows, dict):
        raise MalformedFile("is no manifest")
    files = {}
    for name, row in rows.items():
        is_well_formed = isinstance(row, dict) and is_count(row.get("bytes")) and isinstance(row.get("sha256"), str)
        if not is_well_formed or not stays_in_directory(name) or not SHA256_REGEX.fullmatch(row["sha256"]):
            raise MalformedFile("is no manifest")
        files[name] = WrittenFile(name, row["bytes"], row["sha256"])
    return files


def checkpoint_problem(directory: Path, *, only_file: str | None = None, may_be_deleted: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words; None if nothing is. Reads its files to the end.

    `only_file`: the name of a file; the others are then not read.

    A missing file is usually waited for, since a network file system may show it late. `may_be_deleted` says that this process
    has listed the directory before: if it is gone now, it was deleted, and nothing is waited for.
    """

    def was_deleted() -> bool:
        return may_be_deleted and not directory.exists()

    reader = RetryingReader(lambda text: print(text, flush=True), was_deleted)
    try:
        files = read_manifest(directory, reader)
    except MalformedFile as error:
        return str(error)
    if only_file is not None:
        files = [file for file in files if file.name == only_file]
    difference = _first_difference_from_manifest(directory, files, num_usable_cores(), reader)
    return difference or _wrong_step_problem(directory)


def checkpoint_problem_on_all_ranks(directory: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint, the same answer on every rank; None if nothing is. All ranks must call.

    Rank 0 reads the manifest, and each rank compares its share of the files with it. The answer is that of the lowest rank that
    found something.
    """
    problem: str | None = None
    files: list[WrittenFile] = []
    if runtime.is_main:
        try:
            files = read_manifest(directory)
        except MalformedFile as error:
            problem = str(error)
    problem, files = broadcast_object((problem, files), runtime)
    if problem is None:
        own_files = _files_to_verify_on_rank(files, runtime)
        threads = num_usable_cores() // runtime.local_world_size
        problem = _first_difference_from_manifest(directory, own_files, threads)
    if problem is None and runtime.is_main:
        problem = _wrong_step_problem(directory)
    problem_by_rank: list[str | None] = gather_objects(problem, runtime)
    return next(filter(None, problem_by_rank), None)


def _wrong_step_problem(directory: Path) -> str | None:
    """What is wrong if a checkpoint has the name of another step than its own, as a renamed copy has; None if it has not.

    Also None if its name is not `step-<n>`, or if its own step cannot be read.
    """
    name_match = STEP_DIR_REGEX.fullmatch(directory.name)
    if name_match is None:
        return None
    try:
        header = parse_json(read_bytes(directory / PROGRESS_FILE, max_bytes=MAX_MANIFEST_BYTES))
        step = header["progress"]["step"]
    except (OSError, MalformedFile, KeyError, TypeError):
        return None  # loading it will say what is wrong
    if step == int(name_match[1]):
        return None
    return f"is a checkpoint of step {step} under another name"


def _files_to_verify_on_rank(files: list[WrittenFile], runtime: Runtime) -> list[WrittenFile]:
    """The files that this rank verifies, so that every rank reads about as many bytes.

    From the largest file on, each goes to the rank that has the fewest bytes so far. All ranks come to the same shares.
    """
    bytes_by_rank = [0] * runtime.world_size
    own_files = []
    for written in sorted(files, key=lambda file: (-file.size, file.name)):
        rank = bytes_by_rank.index(min(bytes_by_rank))
        bytes_by_rank[rank] += written.size
        if rank == runtime.rank:
            own_files.append(written)
    return own_files


def _first_difference_from_manifest(
    directory: Path, files: list[WrittenFile], threads: int, reader: RetryingReader | None = None
) -> str | None:
    """The first difference between files of a checkpoint and what their manifest says of them; None if there is none.

    `threads`: files that are read at a time.
    """
    shared_reader = reader or RetryingReader(lambda text: print(text, flush=True))

    def difference_of(file: WrittenFile) -> str | None:
        return file_difference(directory, file, shared_reader)

    with ThreadPoolExecutor(max(1, min(threads, len(files), MAX_THREADS))) as pool:
        return next(filter(None, pool.map(difference_of, files)), None)
