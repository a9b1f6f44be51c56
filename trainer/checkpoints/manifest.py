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
    """Write the manifest of a checkpoint's files into its directory, durably, by which they are checked when they are read.

    `files`: each with name, size and SHA-256. Raises OSError if that fails.
    """
    write_new_file(directory / MANIFEST_FILE, _manifest_bytes({file.name: file for file in files}))


def _manifest_bytes(files: dict[str, WrittenFile]) -> bytes:
    """Make the content of a manifest: sizes and hashes of a checkpoint's files, and a hash of all that, as JSON.

    `files`: by name. The same files give the same bytes, so that a manifest is checked by making it again.
    """
    entries = {}
    for name in sorted(files):
        entries[name] = {"bytes": files[name].size, "sha256": files[name].sha256}
    own_sha256 = hashlib.sha256(json.dumps([FORMAT, entries]).encode()).hexdigest()
    manifest = {"format": FORMAT, "sha256": own_sha256, "files": entries}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def read_manifest(directory: Path, reader: RetryingReader | None = None) -> list[WrittenFile]:
    """Read the manifest of a checkpoint, which says what name, size and SHA-256 each of its files must have, and check it.

    The files themselves are only looked for, not read. `reader`: that of the checkpoint, which waits for a disk that stumbles.
    Raises MalformedFile with what is wrong, if the directory has other files, or a file is missing, or the manifest is damaged.
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
    """List the names in a checkpoint's directory, without the manifest's, to compare them with the manifest.

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
    """Read the file of a manifest: what it says of each file of the checkpoint, by name.

    Raises MalformedFile if it cannot be read, or if a byte of it is not as it was written.
    """
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
    """The fingerprint of a checkpoint: the SHA-256 in its manifest, which covers the hashes of all files; None if unreadable."""
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
    """Parse a checkpoint's manifest: the name, size and SHA-256 of each file that it lists, by name.

    `manifest_json`: parsed JSON, {"files": {"index.json": {"bytes": 812, "sha256": "<64 hex digits>"}}}. Anybody may have written
    it: raises MalformedFile for another form, and for a name that leads out of the directory.
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
    """Verify a checkpoint before its files are used: says what is wrong with it, or None if nothing is. Reads them to the end.

    Such as `index.json is missing`, to follow the checkpoint's name. `only_file`: the name of a file; the others are then not
    read.

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
    """Verify a checkpoint before a run resumes from it, all ranks together; says what is wrong with it, or None if nothing is.

    Rank 0 reads the manifest, and each rank compares its share of the files with it. The answer is that of the lowest rank that
    found something, the same on every rank. All ranks must call.
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
    """Say what is wrong with a checkpoint whose directory names another step than it is of, as a renamed copy does; else None.

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
    """Choose the files of a checkpoint that this rank verifies, so that every rank reads about as many bytes.

    From the largest file on, each goes to the rank that has the fewest bytes so far. All ranks come to the same shares, without
    asking each other.
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
    """Compare files of a checkpoint with its manifest, several at a time; says the first difference, or None if there is none.

    `files`: what the manifest says of each. `threads`: how many may be read at a time. `reader`: that of the checkpoint, which
    waits for a disk that stumbles.
    """
    shared_reader = reader or RetryingReader(lambda text: print(text, flush=True))

    def difference_of(file: WrittenFile) -> str | None:
        return file_difference(directory, file, shared_reader)

    with ThreadPoolExecutor(max(1, min(threads, len(files), MAX_THREADS))) as pool:
        return next(filter(None, pool.map(difference_of, files)), None)
