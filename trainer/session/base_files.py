"""Digests of the base model that a run began with, compared with the files whenever the base is used again.

`identity.json` records the digests at each start. An export or an evaluation reads the base once more, perhaps months
later. If somebody has put other weights under the same path by then, the result would be a model that nobody trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from strategies.atomic_io import reason
from strategies.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.export.tensors import hub_name
from trainer.model.base_files import changes, digests_of, files_of_model
from trainer.model.config import ModelConfig
from trainer.model.loading import weights_directory
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.registry import family_of
from trainer.reporting.run_record import readable_run_record
from trainer.tuning.base import LoraConfig
from trainer.tuning.table import rewrites_base

IDENTITY = "identity.json"
BASE, TEACHER, START = "base", "teacher", "tuning.from"
"""The word that accepts another base, which is also the kind of `identity.json`; the places of other files in it."""


def base_files(config: RunConfig, *, teacher: bool = True) -> dict[str, str]:
    """Digests of the files of base, adapters and teacher, by `<place>/<file name>`.

    The places are `base`, `teacher`, `tuning.from` and `adapter 0`, `adapter 1`, ... Errors: ConfigError for a base that is
    not on this machine, OSError for a file that cannot be read.
    """
    places = {BASE: weights_directory(config.model)}
    if teacher and (model := teacher_model(config.model, config.objective)):
        places[TEACHER] = weights_directory(model)
    if start := getattr(config.tuning, "from_", None):
        places[START] = Path(start).expanduser()
    places |= {f"adapter {number}": Path(path).expanduser() for number, path in enumerate(config.model.adapters)}
    digests: dict[str, str] = {}
    for place, directory in places.items():
        digests |= {f"{place}/{name}": digest for name, digest in digests_of(directory).items()}
    return digests


def recorded_files(run_dir: Path) -> dict[str, str]:
    """What `base_files` was when the run was last started. Errors: ConfigError where the record cannot be read."""
    path = run_dir / IDENTITY
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))[BASE]
        return files_among(kind)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), and it alone says which base the run was trained on; bring the file back, or "
            f"continue with the base that lies there now: accept=[{BASE}]"
        ) from error


def files_among(kind: dict[str, str]) -> dict[str, str]:
    """The digests of files among what `identity.json` has of the kind `base`, which are the keys with a place."""
    return {name: digest for name, digest in kind.items() if "/" in name}


def changed_files(config: RunConfig, recorded: dict[str, str], *, teacher: bool, start: bool) -> list[str]:
    """What differs from the base that is recorded, one line a file; empty where nothing does. No collective.

    `teacher`: whether the files of what the objective compares with matter too. An export has nothing of a teacher.
    `start`: whether the model before training is asked, so that the adapter that training went on from matters.
    """
    try:
        present = base_files(config, teacher=teacher)
        directory = weights_directory(config.model)
        recorded, present = _of_model(recorded, directory), _of_model(present, directory)
    except ConfigError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename}: cannot be read ({reason(error)})"]
    left_out = []
    if not teacher:
        left_out.append(f"{TEACHER}/")
    if not _reads_start(config, teacher=teacher, start=start):
        left_out.append(f"{START}/")
    recorded, present = _without(recorded, left_out), _without(present, left_out)
    return changes(recorded, present)


def _of_model(digests: dict[str, str], directory: Path) -> dict[str, str]:
    """The digests without those of files in the base's `directory` that its loader does not read. Errors: ConfigError."""
    prefix = f"{BASE}/"
    base = {name.removeprefix(prefix): digest for name, digest in digests.items() if name.startswith(prefix)}
    read = files_of_model(base, directory)
    return _without(digests, [prefix]) | {f"{prefix}{name}": digest for name, digest in read.items()}


def _without(digests: dict[str, str], prefixes: list[str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if not name.startswith(tuple(prefixes))}


def _reads_start(config: RunConfig, *, teacher: bool, start: bool) -> bool:
    """Whether the adapter that `tuning.from` names still decides something once the run has a checkpoint.

    Of LoRA every tensor is trained, and so is in the checkpoint. Other methods take projections from the file that no
    checkpoint has, and PiSSA and OLoRA the part that they split off the base.
    """
    if not isinstance(config.tuning, LoraConfig) or rewrites_base(config.tuning.init):
        return True
    return start or (teacher and family_of(config.objective).compares(config.objective))


def use_recorded_base(
    config: RunConfig, run_dir: Path, accept: Collection[str], *, teacher: bool, start: bool = False
) -> list[str]:
    """Settle `config` on the base that the run in `run_dir` was trained on, and compare the files that lie there with it.

    A hub id is read at the commit that the run resolved it to. `teacher` and `start` are those of `changed_files`. Returns the
    differences that were accepted. Errors: ConfigError that names each file where the base is another one and `accept` has no
    `base`, and for a base that is not on this machine.
    """
    pin_commit(config, run_dir)
    weights_directory(config.model)  # a base that is not here at all is no other base
    try:
        recorded = recorded_files(run_dir)
    except ConfigError as error:
        if BASE in accept:
            return [f"{BASE}: {run_dir.name}/{IDENTITY} could not be read, and the base was taken as it was"]
        raise error
    changed = changed_files(config, recorded, teacher=teacher, start=start)
    if not changed:
        return []
    if BASE in accept:
        return [f"{BASE}: {line}" for line in changed]
    raise ConfigError(
        "\n    ".join(
            [
                f"{run_dir}: its base is not the one that it was trained on (base: {config.model.path}). Bring these files back, "
                f"or continue with what lies there now: accept=[{BASE}]",
                *changed,
            ]
        )
    )


def pin_commit(config: RunConfig, run_dir: Path, *, may_fetch: bool = True) -> None:
    """Let a hub id mean the commit that the run in `run_dir` resolved it to, if the run's record says which.

    Without `may_fetch` a model whose snapshot would have to be fetched stays as it is.
    """
    commit = readable_run_record(run_dir).base_commit
    if commit is None:  # also if the run ended before its record was written
        return
    if may_fetch:
        config.model = at_commit(config.model, commit)
        return
    with contextlib.suppress(ConfigError):  # the snapshot is not here
        pinned = at_commit(replace(config.model, download=False), commit)
        config.model = replace(pinned, download=config.model.download)


def at_commit(model: ModelConfig, commit: str | None) -> ModelConfig:
    """The settings of a hub model at one of its commits; those of a directory or of a typed revision stay as they are.

    A tokenizer of another repository has no such commit, so that the base is then named by its snapshot. If this machine has
    another commit alone, that one is taken: a new commit of a hub mostly has the same weights, and the digests say whether.
    """
    if commit is None or model.revision not in (None, commit) or Path(str(model.path)).expanduser().is_dir():
        return model
    pinned = replace(model, revision=commit)
    try:
        snapshot = weights_directory(replace(pinned, download=False))
    except ConfigError:
        # Code is taken from no other commit than that of the run.
        may_be_fetched = (model.download and model.tokenizer is None) or model.trust_remote_code
        return pinned if may_be_fetched else replace(model, revision=None)
    return pinned if model.tokenizer is None else replace(model, path=str(snapshot))


def base_commit(config: RunConfig) -> str | None:
    """The commit of the hub that the base was resolved to; None for a directory of the user's own."""
    _, commit = hub_name(str(weights_directory(config.model)))
    return commit
