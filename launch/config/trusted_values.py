"""Values that reach out of a run and that this user has typed before, one small file each, outside all runs.

A file is named by the SHA-256 of its value, so that processes that start together need no lock, and a look-up opens
no file. The directory is `SHARDTUNE_STATE`, or `shardtune` in `XDG_STATE_HOME`, or `~/.local/state/shardtune`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.config.outside_values import ValueNeedingConsent
    from trainer.config.run import RunConfig

STATE_DIRECTORY_VARIABLE = "SHARDTUNE_STATE"
"""The environment variable that names another directory."""
VALUES_DIR_NAME = "typed"
MAX_VALUES = 2000
"""Most values that are kept. Beyond that, those that were not used for longest are forgotten."""
USE_NOTED_AGAIN_AFTER_S = 86400.0
"""Seconds after which the use of a value is noted again, so that not every start writes."""
WRITABLE_BY_OTHERS = 0o022
"""Bits of a directory's mode. Values in such a directory may be somebody else's, and are not believed."""


def trusted_values_directory() -> Path | None:
    """Where to remember which risky values of runs this user has typed: $SHARDTUNE_STATE, or the XDG state directory.

    It need not exist yet. None if the user has no home directory, as in some containers.
    """
    configured = os.environ.get(STATE_DIRECTORY_VARIABLE)
    if configured:
        return Path(configured).absolute()
    state_home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if state_home.is_absolute():  # the XDG specification says to ignore a relative path
        return state_home / "shardtune"
    try:
        return Path.home() / ".local" / "state" / "shardtune"
    except RuntimeError:
        return None


def was_value_allowed_before(identity: dict[str, Any] | None) -> bool:
    """Whether this user has typed a risky value of a run before, so that a command which reads the run may use it unasked.

    Risky values reach out of a run, such as code to execute or an address to send data to.
    `identity`: what such a value is recognised by, {"code": SHA-256}; None for one that cannot be recognised, which is never
        remembered.

    Looks for the value's file in the user's state directory, which several machines may share. If it is there, its use is noted
    by the file's modification time, at most once a day, because the values that were not used for longest are forgotten.
    """
    state_dir = trusted_values_directory()
    if identity is None or state_dir is None:
        return False
    file = state_dir / VALUES_DIR_NAME / _identity_file_name(identity)
    try:
        # The content is compared too, because a file that was put there by hand may have any name.
        if _others_can_write(file.parent) or json.loads(file.read_bytes()) != _as_read_from_json(identity):
            return False
        if time.time() - file.stat().st_mtime > USE_NOTED_AGAIN_AFTER_S:
            os.utime(file)
    except (OSError, ValueError):
        return False
    return True


def remember_values(values: Iterable[ValueNeedingConsent]) -> None:
    """Remember risky values that the user typed on the command line, so that later commands on the run need not ask again.

    Some settings reach out of a run, such as code to execute or an address that data is sent to. A command that reads a run's
    configuration uses them only if this user has typed them before, since somebody else may have written it.

    `values`: those of the run. The `identity` of a value is what it is recognised by, such as {"code": SHA-256}; None if it
        cannot be, so that it must be typed each time.

    Writes a file for each new identity into the user's state directory, and deletes the longest unused ones beyond `MAX_VALUES`.
    If the directory cannot be written, or others can write it, a warning on stderr says so; it is no error.
    """
    identities = [value.identity for value in values if value.identity is not None]
    # To look for a known one also notes that it was used.
    new_identities = [identity for identity in identities if not was_value_allowed_before(identity)]
    if not new_identities:
        return
    state_dir = trusted_values_directory()
    if state_dir is None:
        _warn("this user has no home directory")
        return
    try:
        _write_identities(new_identities, state_dir)
    except OSError as error:
        _warn(f"{state_dir} cannot be written ({error.strerror or error})")


def _write_identities(identities: list[dict[str, Any]], state_dir: Path) -> None:
    """Write a file for each identity (what a trusted value is recognised by) into the user's state directory.

    Makes the directory if needed, private to the user, and deletes the values unused for longest. Only warns if others can write
    the directory, since nobody would believe its files. Raises OSError.
    """
    values_directory = state_dir / VALUES_DIR_NAME
    for folder in (state_dir, values_directory):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _others_can_write(values_directory):
        _warn(
            f"{values_directory} is another user's, or can be written by others; chmod 700 it, or set "
            f"{STATE_DIRECTORY_VARIABLE}"
        )
        return
    for identity in identities:
        content = json.dumps(_as_read_from_json(identity)).encode()
        _write_private_file(values_directory / _identity_file_name(identity), content)
    _forget_oldest(values_directory)


def remember_config(config: RunConfig) -> None:
    """Remember every value of a configuration of this user's that needs consent, so that verbs can read its run."""
    from launch.config.outside_values import values_needing_consent

    remember_values(values_needing_consent(config))


def _others_can_write(folder: Path) -> bool:
    """Whether other users can put files into a directory, so that it is no proof of what this user typed. Raises OSError."""
    status = folder.stat()
    is_writable_by_others = bool(status.st_mode & WRITABLE_BY_OTHERS)
    # Root is let through, because root in a container reads the mounted directory of whoever started the container.
    is_of_another_user = os.geteuid() not in (0, status.st_uid)
    return is_writable_by_others or is_of_another_user


def _identity_file_name(identity: dict[str, Any]) -> str:
    """The name of a value's file: the SHA-256 of its identity."""
    sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    return f"{sha256.hexdigest()}.json"


def _as_read_from_json(identity: dict[str, Any]) -> Any:
    """An identity as it is read from its file: JSON has lists for tuples, and strings for all keys."""
    return json.loads(json.dumps(identity))


def _write_private_file(file: Path, content: bytes) -> None:
    """Write a file that only this user can read. It is complete as soon as it exists, because a draft is renamed.

    Several processes that start together may write the same file: each has a draft of its own.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_native_id()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
    draft.replace(file)


def _forget_oldest(values_directory: Path) -> None:
    """Delete the values that were not used for longest, beyond `MAX_VALUES`."""
    files = sorted(values_directory.glob("*.json"), key=_last_used_s, reverse=True)
    for file in files[MAX_VALUES:]:
        file.unlink(missing_ok=True)


def _last_used_s(file: Path) -> float:
    """When a value was last used, in seconds since 1970; 0 if its file is missing."""
    try:
        return file.stat().st_mtime
    except OSError:  # another start has just forgotten it
        return 0.0


def _warn(problem: str) -> None:
    """Print a warning that values cannot be remembered, and why."""
    print(
        f"warning: {problem}: verbs that read this run later will ask for what it reaches out to",
        file=sys.stderr,
        flush=True,
    )
