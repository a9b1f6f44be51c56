"""The state of a run and how it ended, in two small files, because exit codes do not survive torchrun or srun.

`status.json` (state, reason, step, job, restart, pid, host, time) is replaced atomically by the launcher and by rank
0. `failure.json` is written once, by the first rank that fails, and removed by a success and by the next attempt.
Nothing here communicates.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Any

from strategies import atomic_io, exit_codes, shared_files
from strategies.errors import OutOfMemory, ShardtuneError, StorageError
from strategies.redaction import redact

CONFIG_SHA256_REGEX = re.compile(r"^# sha256: ([0-9a-f]{64})$", re.MULTILINE)
"""The line of a run's `config.yaml` with the hash of its configuration."""


class RunState(StrEnum):
    """What `status.json` may say. `preempted`: the run saved its state and can be resumed by the same command."""

    running = "running"
    done = "done"
    preempted = "preempted"
    failed = "failed"


RESUMED_STEP_KEY = "resumes_from"
"""Key of `status.json` until a start of a preempted run begins to train: the step at which the run had stopped."""


MESSAGE_SUFFICES_KEY = "message_suffices"
"""Key of `failure.json`: whether the message says all, so that no traceback need be shown."""


def resumable_step(status: dict[str, Any]) -> int | None:
    """The step that a preempted run had saved, by its `status.json`; None if it has trained since, or had saved no step.

    Starts that end before they train keep it: the run may have been stopped again while its data was prepared.
    """
    if RESUMED_STEP_KEY in status:
        return status[RESUMED_STEP_KEY]
    if status.get("state") != RunState.preempted:
        return None
    return status.get("step") or None


def is_refused_start(status: dict[str, Any]) -> bool:
    """Whether a `status.json` says that a start was refused before it trained, so that the run is preempted as before."""
    return status.get("state") == RunState.preempted and status.get("refused") is True


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, durably: readers see the old file or the new one. Errors: StorageError."""
    write_atomic(path, text.encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by these bytes, durably: readers see the old file or the new one. Errors: StorageError."""
    try:
        atomic_io.make_directories(path.parent)
        shared_files.replace_shared_file(path, content, _writer_token())
        atomic_io.sync_directory(path.parent)
    except OSError as error:
        remedy = f"{shared_files.free_space_advice(error)}choose another directory (run.dir=, or to=)"
        raise StorageError(f"{path}: cannot write ({error.strerror or error}); {remedy}") from error


def _writer_token() -> str:
    """A name for this thread's temporary file, so that other threads and processes that write the same file have another."""
    return f"{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}"


RESTART_COUNT_VARIABLE = "SHARDTUNE_STARTED_AGAIN"
"""The variable by which a launcher tells its ranks how often it has started them again (`launcher.retry`)."""


def restart_count() -> int:
    """How often SLURM and the launcher have started this run again; 0 in its first start."""
    by_slurm = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    by_launcher = int(os.environ.get(RESTART_COUNT_VARIABLE) or 0)
    return by_slurm + by_launcher


def job_start_fields() -> dict[str, Any]:
    """Id of the SLURM job (None outside one) and number of its start, which tell records of several starts apart."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": restart_count()}


def write_status(run_dir: Path, state: RunState | str, **fields: Any) -> None:
    """Tell other processes how a run stands: replaces its `status.json` by a new state, with this process and the time.

    `fields`: JSON values by key, such as `reason` and `step`, which override those written here. Secrets in the reason are
    masked. On a full disk the old file is overwritten in its place. Raises StorageError.
    """
    status = {
        "state": RunState(state).value,
        "reason": None,
        "step": None,
        **job_start_fields(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": time.time(),
        **fields,
    }
    if isinstance(status["reason"], str):
        status["reason"] = redact(status["reason"])
    path = Path(run_dir) / "status.json"
    text = json.dumps(status, indent=1) + "\n"
    try:
        write_text_atomic(path, text)
    except StorageError:
        # On a full disk there is no room for a second file, but the first one keeps its blocks.
        if not _overwrite_in_place(path, text.encode()):
            raise


def _overwrite_in_place(path: Path, content: bytes) -> bool:
    """Write a small file on a full disk, into the blocks that it has already; returns whether it took all bytes.

    A reader may meet half of them.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            written_bytes = file.write(content)
            file.truncate()
    except OSError:
        return False
    return written_bytes == len(content)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The content of `status.json`, empty where there is none that can be read."""
    return read_json_or_empty(Path(run_dir) / "status.json")


def record_failure(
    run_dir: Path,
    rank: int,
    error: BaseException,
    phase: str,
    step: int | None = None,
    *,
    replace: bool = False,
    **process_fields: Any,
) -> bool:
    """Write why a run failed into `failure.json`, unless another rank was first; returns whether it was written.

    The first rank that fails is the cause, and the others fail because of it. The file appears whole or not at all; nothing is
    raised if the disk fails. `phase`: what the rank was doing. `replace`: overwrite what is there. The launcher does so if a
    rank was killed, of which only its peers could write. `process_fields`: fields such as `host` and `pid` of another
    process, if that one is the cause; they override those of this process.

    Written from the error: `user_error`, whether settings or data are the cause; `message_suffices`, whether it says all without
    its traceback; `retry`, which key of `launcher.retry` allows another start after it, such as `node_fail`; and
    `ran_out_with`, the settings with which memory ran out.
    """
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phase": phase,
        "step": step,
        "error": getattr(error, "recorded_name", None) or type(error).__name__,
        "message": redact(str(error)),
        "user_error": isinstance(error, ShardtuneError) and error.is_user_error,
        MESSAGE_SUFFICES_KEY: isinstance(error, ShardtuneError),
        "exit_code": getattr(error, "exit_code", exit_codes.FAILED),
        "retry": getattr(error, "retry", None),
        "ran_out_with": error.ran_out_with if isinstance(error, OutOfMemory) else {},
        "traceback": redact("".join(traceback.format_exception(error))),
        **job_start_fields(),
        "time": time.time(),
        **process_fields,
    }
    path = Path(run_dir) / "failure.json"
    content = json.dumps(record, indent=1).encode() + b"\n"
    try:
        if replace:
            shared_files.replace_shared_file(path, content, _writer_token())
            return True
        return shared_files.claim_shared_file(path, content, _writer_token())
    except OSError:  # the disk itself may be the failure: the error goes to stderr anyway
        return False


def read_failure(run_dir: Path) -> dict[str, Any]:
    """The content of `failure.json`, empty where there is none that can be read."""
    return read_json_or_empty(Path(run_dir) / "failure.json")


def message_suffices(failure: dict[str, Any]) -> bool:
    """Whether the message of a recorded failure (`failure.json`) says all that a user needs, so that no traceback is shown.

    So it is for errors of the user and for lost ranks. An earlier version recorded the first alone, as `user_error`.
    """
    return bool(failure.get(MESSAGE_SUFFICES_KEY, failure.get("user_error")))


def is_error_of_run(failure: dict[str, Any]) -> bool:
    """Whether a recorded failure (`failure.json`) is an error of the user that another start would meet again.

    Another rank's end is never its cause, as it may be of a lost connection.
    """
    return bool(failure.get("user_error")) and failure.get("retry") is None


def clear_failure(run_dir: Path) -> None:
    """Forget the failure of an earlier attempt."""
    (Path(run_dir) / "failure.json").unlink(missing_ok=True)


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing, cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
