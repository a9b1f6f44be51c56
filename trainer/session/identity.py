"""What identifies a run, so that it is not silently resumed as another. Compared between ranks and with earlier starts.

`identity.json` lies in the run directory beside `checkpoints/`. It holds, by kind (`trainer/config/resuming.py`), the
settings that decide the result and fingerprints of what settings only name (prepared data, files of the base, source
and libraries), and the differences that were accepted on the way here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, broadcast_object, first_error, gather_objects
from trainer.checkpoints.layout import places_of, published
from trainer.checkpoints.resume_selection import settled
from trainer.config.resuming import KINDS, defaults_of, flat, plain
from trainer.config.run import RunConfig
from trainer.config.tree import kind_of
from trainer.data.config import identifying
from trainer.data.prepare import Prepared
from trainer.reporting.status import write_text_atomic
from trainer.session.base_files import IDENTITY, base_files

ACCEPTED = "accepted"
COMPUTING = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "tokenizers",
    "numpy",
    "bitsandbytes",
    "flash-attn",
)
"""Packages whose version may change a result."""
PACKAGES = ("strategies", "trainer")
SHOWN = 8
Kinds = dict[str, dict[str, Any]]


def identity_of(config: RunConfig, data: Prepared, *, files: bool = True) -> Kinds:
    """What decides the run's result, by kind. `files=False` reads none, so that base and code are empty. No collective."""
    kinds: Kinds = {kind: {} for kind in KINDS if kind != "unknown"}
    settings = plain(config)
    settings["data"] = identifying(settings["data"])
    for key, value in flat(settings).items():
        if kind := kind_of(key):
            kinds[kind][key] = value
    kinds["data"] |= {"documents": len(data.train), "fingerprint": data.train.fingerprint}
    kinds["base"] = {**kinds["base"], **base_files(config)} if files else {}
    kinds["code"] = {"source": source_digest()} if files else {}
    kinds["versions"] = _versions()
    settled: Kinds = json.loads(json.dumps(kinds, default=str))  # as it is read back
    return settled


def differences(there: Kinds, here: Kinds, *, accept: list[str]) -> list[str]:
    """`kind: key: value there, value here` for everything that differs and is not accepted."""
    lines = []
    for kind in KINDS:
        old, new = there.get(kind, {}), here.get(kind, {})
        if kind not in accept:
            lines += [
                f"{kind}: {key}: {old.get(key, '-')} there, {new.get(key, '-')} here"
                for key in sorted(old.keys() | new.keys())
                if old.get(key, "-") != new.get(key, "-")
            ]
    return lines


def agree_on_run(run_dir: Path | None, sha256: str, runtime: Runtime) -> Path:
    """Rank 0's run directory, on every rank; raises ConfigError where ranks were given different configs."""
    hashes = gather_objects(sha256, runtime)
    if len(set(hashes)) > 1:
        odd = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
        raise ConfigError(
            f"rank {odd} has another configuration than rank 0 ({hashes[odd][:8]} and {hashes[0][:8]}): start all ranks "
            "with the same words and the same files"
        )
    agreed = broadcast_object(None if run_dir is None else str(run_dir), runtime)
    if agreed is None:
        raise ConfigError("run.dir: rank 0 has none; set run.dir")
    return Path(agreed)


def establish(config: RunConfig, data: Prepared, run_dir: Path, runtime: Runtime) -> dict[str, Any]:
    """Compare the ranks, and the run with the one whose state it goes on from; write `identity.json`. All ranks must call.

    Returns what `run.json` says of it: the identity, and the differences that were accepted. Raises ConfigError on every
    rank with each difference that `run.accept` does not name, StorageError on every rank where the file cannot be written
    or what it tells of cannot be read.
    """
    mine: Kinds = {}
    error: ConfigError | StorageError | None = None
    try:
        mine = identity_of(config, data, files=runtime.local_rank == 0)  # once a host
    except (ConfigError, StorageError) as caught:
        error = caught
    except OSError as caught:
        error = StorageError(f"{caught.filename}: cannot be read ({caught.strerror or caught}); is it still there?")
    _fail_alike(error, runtime)
    accept = config.run.accept
    record: dict[str, Any] = {}
    everybody = gather_objects((socket.gethostname(), mine), runtime)
    if runtime.is_main:
        try:
            _same_everywhere(everybody, accept)
            accepted = _same_as_before(config, mine, run_dir)
            record = {"identity": mine, "accepted": accepted}
            write_text_atomic(run_dir / IDENTITY, json.dumps({**mine, ACCEPTED: accepted}, indent=1) + "\n")
        except (ConfigError, StorageError) as caught:
            error = caught
    _fail_alike(error, runtime)
    return dict(broadcast_object(record, runtime))


def _fail_alike(error: ConfigError | StorageError | None, runtime: Runtime) -> None:
    """Raise on every rank where there is an error on any. All ranks must call."""
    if failed := first_error(error, runtime):
        if error is not None:
            raise error
        _, kind, message = failed.split(": ", 2)
        raise StorageError(message) if kind == StorageError.__name__ else ConfigError(message)


def _same_everywhere(everybody: list[tuple[str, Kinds]], accept: list[str]) -> None:
    first_host, first = everybody[0]
    for rank, (host, kinds) in enumerate(everybody):
        compared = first if kinds["code"] else {**first, "base": {}, "code": {}}
        if lines := differences(compared, kinds, accept=accept):
            refusal = (
                f"rank {rank} on {host} would train something else than rank 0 on {first_host} (there); give both the "
                f"same, or accept it: {_word(lines)}"
            )
            raise ConfigError("\n    ".join([refusal, *_shown(lines)]))


def _same_as_before(config: RunConfig, mine: Kinds, run_dir: Path) -> list[str]:
    """What was accepted before in the run whose state is gone on from, then the differences from it, all accepted now."""
    home = _home_of_state(config, run_dir)
    if home is None:
        return []
    try:
        before, accepted = _read(home / IDENTITY)
    except (OSError, ValueError) as error:
        if "unknown" in config.run.accept:
            return [f"unknown: {home / IDENTITY} cannot be read"]
        raise ConfigError(
            f"run.resume: {home / IDENTITY} cannot be read ({error}), so that nobody knows what the checkpoints beside it were "
            "trained on; keep checkpoints in their run's directory, or accept it: run.accept=[unknown]"
        ) from error
    before = _with_later_settings(before, config)
    if lines := differences(before, mine, accept=config.run.accept):
        refusal = (
            f"run.resume: what is in {home} was trained with something else (there); undo it, start a new run.dir without "
            f"run.resume, or continue with the change and have it recorded: {_word(lines, config.run.accept)}"
        )
        raise ConfigError("\n    ".join([refusal, *_shown(lines)]))
    return list(dict.fromkeys([*accepted, *differences(before, mine, accept=[])]))


def _with_later_settings(before: Kinds, config: RunConfig) -> Kinds:
    """`before` with the default of each setting that the version which wrote it did not know.

    An earlier version behaved as a new setting's default says: a run of that version is refused only if the setting has
    another value now.
    """
    kinds = {kind: dict(values) for kind, values in before.items()}
    known_keys = {key for values in before.values() for key in values}
    for key, default in defaults_of(config).items():
        kind = kind_of(key)
        if kind is not None and key not in known_keys:
            kinds.setdefault(kind, {})[key] = json.loads(json.dumps(default, default=str))  # as it is read back
    return kinds


def _read(path: Path) -> tuple[Kinds, list[str]]:
    """An `identity.json`: the kinds, and what was accepted. Raises OSError, ValueError where `establish` does not write such."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(found.get(kind, {}), dict) for kind in KINDS):
        raise ValueError("it does not say what belongs to each kind")
    accepted = found.pop(ACCEPTED, [])
    if not isinstance(accepted, list) or not all(isinstance(line, str) for line in accepted):
        raise ValueError("it does not list what was accepted")
    return found, accepted


def _home_of_state(config: RunConfig, run_dir: Path) -> Path | None:
    """The run directory whose checkpoint will be loaded; None where the run starts afresh."""
    places = places_of(run_dir, config.checkpoint.fallback_dir)
    resume = settled(places, config.run.resume)
    if resume == "never" or (resume == "auto" and not published(places)):
        return None
    if resume == "auto":
        return run_dir
    state = Path(resume).expanduser().absolute()
    if state.parent in [place.absolute() for place in places]:
        return run_dir
    above = list(state.parents)[1:3] or [state]  # of checkpoints/step-000005, of checkpoints/given-up-1/step-000005
    return next((run for run in above if (run / IDENTITY).is_file()), above[0])


def _word(lines: list[str], accept: list[str] | None = None) -> str:
    kinds = [*(accept or []), *dict.fromkeys(line.partition(":")[0] for line in lines)]
    return f"run.accept=[{','.join(kinds)}]"


def _shown(lines: list[str]) -> list[str]:
    return [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]


def source_digest() -> str:
    """SHA-256 of the source that trains, of this installation. Reads a few MB."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _versions() -> dict[str, str]:
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions_of(COMPUTING)}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; a missing one is left out."""
    return {package: found for package in packages if (found := _version_of(package)) is not None}


@cache
def _version_of(package: str) -> str | None:
    """Read once: what pip wrote of a package is long."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
