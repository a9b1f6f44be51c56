"""The identity of a run: everything that decides its result, so that it is not silently resumed as another run.

It is compared between ranks and with the run's earlier starts. `identity.json` lies in the run directory beside
`checkpoints/`. It holds, by kind (`trainer/config/resuming.py`), the settings that decide the result, and fingerprints of
what settings only name (prepared data, files of the base, source and libraries). It also lists the differences that were
accepted at this start and earlier ones.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, broadcast_object, first_rank_error, gather_objects
from trainer.build.reward_models import reward_model_digests
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.resume_selection import resolve_resume_setting
from trainer.config.resuming import KINDS_OF_CHANGE, default_settings, flatten_settings, settings_as_dict
from trainer.config.run import RunConfig
from trainer.config.tree import change_kind_of_setting
from trainer.data.config import identifying_data_settings
from trainer.data.prepare import PreparedData
from trainer.reporting.status import write_text_atomic
from trainer.rollout.rewards.copies import digests_of_reward_copies
from trainer.session.base_files import IDENTITY_FILE, base_file_digests

ACCEPTED_KEY = "accepted"
COMPUTING_PACKAGES = (
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
DIGESTED_SOURCE_PACKAGES = ("strategies", "trainer")
MAX_SHOWN_DIFFERENCES = 8
DIGEST_REGEX = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{8,}\b")
"""A digest in a message; its first 12 characters are shown."""
NAME_BY_KIND = {
    "data": "the prepared data",
    "base": "the base model",
    "tuning": "the tuning",
    "objective": "the objective",
    "rewards": "the rewards",
    "order": "the order of the documents",
    "optimizer": "the optimizer",
    "precision": "the precision",
    "code": "shardtune's code",
    "versions": "the versions of libraries",
    "unknown": "everything",
}
"""The kinds of change (`KINDS_OF_CHANGE`) as messages call what changed."""
FINGERPRINT_WORDS = "fingerprint of the data files, of the tokenizer with its template, and of how rows are read"
"""What messages call the key `fingerprint`. The other keys are settings, or name what they are a digest of."""
RunIdentity = dict[str, dict[str, Any]]
"""Everything that decides a run's result: kind (`KINDS_OF_CHANGE`), then key, then value."""


def run_identity(config: RunConfig, data: PreparedData, *, reads_files: bool = True) -> RunIdentity:
    """Collect everything that decides a run's result, so that a resumed run can be compared with it. No collective.

    By kind (`KINDS_OF_CHANGE`) and key, as JSON values: {"data": {"data.seed": 0, "documents": 1200}, "code": {"source": "c3d4"},
    "versions": {"torch": "2.9"}}, where `documents` counts training sequences. `reads_files`: whether files are read and
    digested. If not:

    - `base` is empty: it has neither the digests of the base's files nor the settings of the base.
    - `code` is empty.
    - `rewards` has settings, but no digests of reward files and reward models.
    """
    identity = _identifying_settings(config)
    identity["data"] |= {"documents": len(data.train), "fingerprint": data.train.fingerprint}
    major, minor, _ = platform.python_version_tuple()
    identity["versions"] = {"python": f"{major}.{minor}", **versions_of(COMPUTING_PACKAGES)}
    if reads_files:
        identity["base"] |= base_file_digests(config)
        identity["code"] = {"source": source_digest()}
        if config.run.dir is not None:
            identity["rewards"] |= digests_of_reward_copies(Path(config.run.dir))
        identity["rewards"] |= reward_model_digests(config.objective)
    else:
        identity["base"] = {}
        identity["code"] = {}
    # As it would be read from a file, so that the two compare equal: tuples become lists, paths become text.
    as_json_values: RunIdentity = json.loads(json.dumps(identity, default=str))
    return as_json_values


def _identifying_settings(config: RunConfig) -> RunIdentity:
    """Collect the settings that decide a run's result, by kind (`KINDS_OF_CHANGE`) and key.

    A kind without such settings is empty.
    """
    # Nothing is recorded under `unknown`: that kind means an identity that cannot be read.
    identity: RunIdentity = {kind: {} for kind in KINDS_OF_CHANGE if kind != "unknown"}
    settings = settings_as_dict(config)
    settings["data"] = identifying_data_settings(settings["data"])
    for key, value in flatten_settings(settings).items():
        kind = change_kind_of_setting(key)
        if kind is not None:  # None: the setting does not decide the result
            identity[kind][key] = value
    return identity


@dataclass(frozen=True, slots=True)
class IdentityDifference:
    """A value that differs between two identities: `recorded`, of an earlier start or of rank 0, and `current`, of this rank."""

    kind: str
    """One of `KINDS_OF_CHANGE`, which `run.accept` names."""
    key: str
    recorded: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.kind}: {self.key}: {self.recorded} there, {self.current} here"

    def shown_text(self) -> str:
        """This difference as a line of a message: in words, and of each digest only the first 12 characters."""
        words = FINGERPRINT_WORDS if self.key == "fingerprint" else self.key
        return DIGEST_REGEX.sub(r"\1", f"{self.kind}: {words}: {self.recorded} there, {self.current} here")


def identity_differences(recorded: RunIdentity, current: RunIdentity, *, accept: list[str]) -> list[IdentityDifference]:
    """Find the values that differ between two identities: `recorded` of an earlier start or another rank, `current` of this one.

    `accept`: kinds whose differences are not reported. A missing value is `-`.
    """
    differing = []
    for kind in KINDS_OF_CHANGE:
        if kind in accept:
            continue
        recorded_values = recorded.get(kind, {})
        current_values = current.get(kind, {})
        for key in sorted(recorded_values.keys() | current_values.keys()):
            difference = IdentityDifference(kind, key, recorded_values.get(key, "-"), current_values.get(key, "-"))
            if difference.recorded != difference.current:
                differing.append(difference)
    return differing


def agree_on_run(run_dir: Path | None, config_sha256: str, runtime: Runtime) -> Path:
    """Check that all ranks have the same configuration, and tell each the run directory of rank 0. All ranks must call.

    `config_sha256`: hash of this rank's configuration. Raises ConfigError if ranks have different configurations, or rank 0 no
    directory.
    """
    hashes = gather_objects(config_sha256, runtime)
    if len(set(hashes)) > 1:
        other_ranks = [rank for rank, rank_sha256 in enumerate(hashes) if rank_sha256 != hashes[0]]
        differing_rank = other_ranks[0]
        raise ConfigError(
            f"rank {differing_rank} has another configuration than rank 0 ({hashes[differing_rank][:8]} and "
            f"{hashes[0][:8]}): start all ranks with the same words and the same files"
        )
    agreed = broadcast_object(None if run_dir is None else str(run_dir), runtime)
    if agreed is None:
        raise ConfigError("run.dir: rank 0 has none; set run.dir")
    return Path(agreed)


def compare_and_write_identity(
    config: RunConfig, data: PreparedData, run_dir: Path, runtime: Runtime
) -> dict[str, Any]:
    """Check that ranks agree and that a resumed run is still the same run; then write `identity.json`. All ranks must call.

    An identity is what decides a run's result: settings, data, files of the base, code, versions. Returns the fields of
    `run.json`: the identity, and the differences that were accepted.

    Raises ConfigError on every rank, with each difference that `run.accept` does not name. Raises StorageError on every rank if
    the file cannot be written, or if something that it identifies cannot be read.
    """
    # Each rank collects its own identity. An error of one is raised on all, so that none waits for the others.
    local_identity: RunIdentity = {}
    error: ConfigError | StorageError | None = None
    try:
        local_identity = run_identity(config, data, reads_files=runtime.local_rank == 0)  # one rank of each host
    except (ConfigError, StorageError) as caught:
        error = caught
    except OSError as caught:
        error = StorageError(f"{caught.filename}: cannot be read ({caught.strerror or caught}); is it still there?")
    _raise_on_all_ranks(error, runtime)

    # Rank 0 compares them.
    accept = config.run.accept
    record: dict[str, Any] = {}
    identity_by_rank = gather_objects((socket.gethostname(), local_identity), runtime)
    if runtime.is_main:
        try:
            _raise_if_ranks_differ(identity_by_rank, accept)
            accepted = _compare_with_earlier_start(config, local_identity, run_dir)
            record = {"identity": local_identity, "accepted": accepted}
            write_text_atomic(
                run_dir / IDENTITY_FILE, json.dumps({**local_identity, ACCEPTED_KEY: accepted}, indent=1) + "\n"
            )
        except (ConfigError, StorageError) as caught:
            error = caught
    _raise_on_all_ranks(error, runtime)
    return dict(broadcast_object(record, runtime))


def _raise_on_all_ranks(error: ConfigError | StorageError | None, runtime: Runtime) -> None:
    """Raise on every rank if any rank has an error, so that none waits for it.

    Its own, else that of the lowest rank that has one. All ranks must call.
    """
    first_failure = first_rank_error(error, runtime)  # class name (`kind`) and text of that rank's error
    if first_failure is None:
        return
    if error is not None:
        raise error
    # An error of another rank arrives as its class's name and its text. It is of one of two classes.
    if first_failure.kind == StorageError.__name__:
        raise StorageError(first_failure.text)
    raise ConfigError(first_failure.text)


def _raise_if_ranks_differ(identity_by_rank: list[tuple[str, RunIdentity]], accept: list[str]) -> None:
    """Raise ConfigError if a rank would train something else than rank 0, in a kind that is not among `accept` (`run.accept`).

    `identity_by_rank`: (host, identity) of each rank.
    """
    first_host, first_identity = identity_by_rank[0]
    for rank, (host, identity) in enumerate(identity_by_rank):
        expected = first_identity
        read_no_files = not identity["code"]
        if read_no_files:  # one rank of each host reads the files whose digests are in these three kinds
            expected = {**first_identity, "base": {}, "code": {}, "rewards": {}}
        changed = identity_differences(expected, identity, accept=accept)
        if changed:
            refusal = (
                f"rank {rank} on {host} would train something else than rank 0 on {first_host}: {_changed_text(changed)} "
                f"differs (there: rank 0, here: rank {rank}). Give both the same, or accept it: "
                f"{_accept_setting_text(changed)}"
            )
            raise ConfigError("\n    ".join([refusal, *_shown_difference_lines(changed)]))


def _compare_with_earlier_start(config: RunConfig, current: RunIdentity, run_dir: Path) -> list[str]:
    """Compare this start (`current`) with the earlier run whose checkpoint will be loaded; returns all accepted differences.

    First those that the earlier run's record lists, then those between it and this start. Empty if no checkpoint will be loaded.
    Raises ConfigError, with each difference, if `run.accept` does not name all of their kinds.
    """
    earlier_run = _run_dir_of_checkpoint(config, run_dir)
    if earlier_run is None:
        return []
    try:
        recorded, accepted_earlier = _read_identity(earlier_run / IDENTITY_FILE)
    except (OSError, ValueError) as error:
        if "unknown" in config.run.accept:
            return [f"unknown: {earlier_run / IDENTITY_FILE} cannot be read"]
        raise ConfigError(
            f"run.resume: {earlier_run / IDENTITY_FILE} cannot be read ({error}), so that nobody knows what the checkpoints "
            "beside it were trained on; keep checkpoints in their run's directory, or accept it: run.accept=[unknown]"
        ) from error
    # An earlier version did not record the settings that were added since.
    recorded = _with_defaults_of_new_settings(recorded, default_settings(config))
    differences = identity_differences(recorded, current, accept=[])
    not_accepted = [difference for difference in differences if difference.kind not in config.run.accept]
    if not_accepted:
        new_run = "start a new run.dir" if config.run.resume == "auto" else "start a new run.dir without run.resume"
        refusal = (
            f"run.resume={config.run.resume}: {earlier_run} was trained differently: {_changed_text(not_accepted)} changed "
            f"since (there: as it was trained, here: this start). Undo the change, {new_run}, or accept the change: "
            f"{_accept_setting_text(not_accepted, config.run.accept)}"
        )
        raise ConfigError("\n    ".join([refusal, *_shown_difference_lines(not_accepted)]))
    # `run.accept` names the kinds of all differences. Each is listed once.
    accepted_now = [str(difference) for difference in differences]
    return list(dict.fromkeys([*accepted_earlier, *accepted_now]))


def _with_defaults_of_new_settings(recorded: RunIdentity, defaults: dict[str, Any]) -> RunIdentity:
    """Complete the settings of an earlier version's record: each setting that it did not have yet gets its default.

    An earlier version behaved as a new setting's default does. So a run of that version is refused only if the setting has
    another value now. For example {"data": {"data.seed": 0}} becomes {"data": {"data.seed": 0, "data.new": false}, ...}.
    `defaults`: of today's settings, by key.
    """
    completed = {change_kind: dict(settings) for change_kind, settings in recorded.items()}
    recorded_keys = set[str]().union(*recorded.values())
    for key, default in defaults.items():
        change_kind = change_kind_of_setting(key)  # None: the setting does not decide the result
        if change_kind is not None and key not in recorded_keys:
            default_as_json = json.loads(json.dumps(default, default=str))  # as it would be read from the file
            completed.setdefault(change_kind, {})[key] = default_as_json
    return completed


def _read_identity(path: Path) -> tuple[RunIdentity, list[str]]:
    """Read an `identity.json`: (the identity, the accepted differences as lines).

    It has an object for each kind, and a list of lines. Raises OSError if it cannot be read, and ValueError for a file of another
    form.
    """
    identity = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(identity, dict) or not all(isinstance(identity.get(kind, {}), dict) for kind in KINDS_OF_CHANGE):
        raise ValueError("it does not say what belongs to each kind")
    accepted = identity.pop(ACCEPTED_KEY, [])
    if not isinstance(accepted, list) or not all(isinstance(line, str) for line in accepted):
        raise ValueError("it does not list what was accepted")
    return identity, accepted


def _run_dir_of_checkpoint(config: RunConfig, run_dir: Path) -> Path | None:
    """Find the directory of the run whose checkpoint will be loaded; None if the run starts afresh.

    That is `run_dir` for `run.resume=auto` and for a path among its own checkpoints. For a path elsewhere, it is the directory
    above with an `identity.json`.
    """
    checkpoint_dirs = checkpoint_dirs_of(run_dir, config.checkpoint.fallback_dir)
    resume = resolve_resume_setting(checkpoint_dirs, config.run.resume)
    if resume == "never":
        return None
    if resume == "auto":
        return run_dir if checkpoints_in(checkpoint_dirs) else None
    checkpoint = Path(resume).expanduser().absolute()
    is_own_checkpoint = checkpoint.parent in [directory.absolute() for directory in checkpoint_dirs]
    if is_own_checkpoint:
        return run_dir
    # Two levels above <run>/checkpoints/step-000005, or three above <run>/checkpoints/given-up-1/step-000005. Without an
    # `identity.json` in either, the error about it names the first.
    candidates = list(checkpoint.parents)[1:3] or [checkpoint]
    return next((directory for directory in candidates if (directory / IDENTITY_FILE).is_file()), candidates[0])


def _changed_text(changed: list[IdentityDifference]) -> str:
    """Name what differs, by kind: "the prepared data, the base model"."""
    return ", ".join(dict.fromkeys(NAME_BY_KIND[difference.kind] for difference in changed))


def _accept_setting_text(changed: list[IdentityDifference], accept: list[str] | None = None) -> str:
    """The setting that accepts the kinds of these differences, in addition to the kinds in `accept`."""
    kinds = [*(accept or []), *dict.fromkeys(difference.kind for difference in changed)]
    return f"run.accept=[{','.join(kinds)}]"


def _shown_difference_lines(changed: list[IdentityDifference]) -> list[str]:
    """The first differences as lines, and how many more there are."""
    lines = [difference.shown_text() for difference in changed[:MAX_SHOWN_DIFFERENCES]]
    if len(changed) > MAX_SHOWN_DIFFERENCES:
        lines.append(f"and {len(changed) - MAX_SHOWN_DIFFERENCES} more")
    return lines


def source_digest() -> str:
    """Identify the code of this installation that takes part in training: half of the SHA-256 of its Python files.

    Reads a few MB.
    """
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    paths: list[Path] = []
    for package in DIGESTED_SOURCE_PACKAGES:
        paths += (root / package).rglob("*.py")
    for path in sorted(paths):
        # Zero bytes keep names and contents apart, which must not run into each other.
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; packages that are not installed are left out."""
    installed = {}
    for package in packages:
        package_version = _version_of(package)
        if package_version is not None:
            installed[package] = package_version
    return installed


@cache
def _version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed. Cached, since reading a package's metadata is slow."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
