"""The base that a run began with: digests of its files, compared with what lies there whenever the base is used again.

`identity.json` records the digests at each start. An export or an evaluation reads the base once more, perhaps months later.
By then somebody may have put other weights under the same path: the result would be a model that nobody trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from strategies.durable import reason
from strategies.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.export.tensors import hub_name
from trainer.model.base_files import changes, digests_of
from trainer.model.config import ModelConfig
from trainer.model.loading import weights_directory
from trainer.objectives.frozen import teacher_model

IDENTITY = "identity.json"
BASE, TEACHER = "base", "teacher"
"""The word that accepts another base, which is also the kind of `identity.json`; the place of a teacher's files in it."""


def base_files(config: RunConfig, *, teacher: bool = True) -> dict[str, str]:
    """Digests of the files of base, adapters and teacher, by `<place>/<file name>`.

    The places are `base`, `teacher`, `tuning.from` and `adapter 0`, `adapter 1`, ... Errors: ConfigError for a base that is
    not on this machine, OSError for a file that cannot be read.
    """
    places = {BASE: weights_directory(config.model)}
    if teacher and (model := teacher_model(config.model, config.objective)):
        places[TEACHER] = weights_directory(model)
    if start := getattr(config.tuning, "from_", None):
        places["tuning.from"] = Path(start).expanduser()
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
            f"go on with the base that lies there now: accept=[{BASE}]"
        ) from error


def files_among(kind: dict[str, str]) -> dict[str, str]:
    """The digests of files among what `identity.json` has of the kind `base`, which are the keys with a place."""
    return {name: digest for name, digest in kind.items() if "/" in name}


def changed_files(config: RunConfig, recorded: dict[str, str], *, teacher: bool) -> list[str]:
    """What differs from the base that is recorded, one line a file; empty where nothing does. No collective.

    `teacher`: whether its files matter too. An export has nothing of a teacher.
    """
    if not teacher:
        recorded = {name: digest for name, digest in recorded.items() if not name.startswith(f"{TEACHER}/")}
    try:
        present = base_files(config, teacher=teacher)
    except ConfigError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename}: cannot be read ({reason(error)})"]
    return changes(recorded, present)


def use_recorded_base(config: RunConfig, run_dir: Path, accept: Collection[str], *, teacher: bool) -> list[str]:
    """Settle `config` on the base that the run in `run_dir` was trained on, and compare the files that lie there with it.

    A hub id is read at the commit that the run resolved it to. Returns the differences that were accepted. Errors: ConfigError
    that names each file where the base is another one and `accept` has no `base`.
    """
    pin_commit(config, run_dir)
    try:
        recorded = recorded_files(run_dir)
    except ConfigError as error:
        if BASE in accept:
            return [f"{BASE}: {run_dir.name}/{IDENTITY} could not be read, and the base was taken as it was"]
        raise error
    changed = changed_files(config, recorded, teacher=teacher)
    if not changed:
        return []
    if BASE in accept:
        return [f"{BASE}: {line}" for line in changed]
    raise ConfigError(
        "\n    ".join(
            [
                f"{run_dir}: its base is not the one that it was trained on (base: {config.model.path}). Bring these files back, "
                f"or go on with what lies there now: accept=[{BASE}]",
                *changed,
            ]
        )
    )


def pin_commit(config: RunConfig, run_dir: Path, *, may_fetch: bool = True) -> None:
    """Let a hub id mean the commit that the run in `run_dir` resolved it to, if the run's record says which.

    Without `may_fetch` a model whose snapshot would have to be fetched stays as it is.
    """
    try:
        commit = json.loads((run_dir / "run.json").read_text(encoding="utf-8")).get("base_commit")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # a run that ended before its record was written
    if not isinstance(commit, str):
        return
    if may_fetch:
        config.model = at_commit(config.model, commit)
        return
    with contextlib.suppress(ConfigError):  # the snapshot is not here
        pinned = at_commit(replace(config.model, download=False), commit)
        config.model = replace(pinned, download=config.model.download)


def at_commit(model: ModelConfig, commit: str | None) -> ModelConfig:
    """The settings of a hub model at one of its commits; those of a directory or of a typed revision stay as they are.

    A tokenizer of another repository has no such commit, so that the base is then named by its snapshot.
    """
    if commit is None or model.revision is not None or Path(str(model.path)).expanduser().is_dir():
        return model
    pinned = replace(model, revision=commit)
    if model.tokenizer is None:
        return pinned
    return replace(model, path=str(weights_directory(pinned)))


def base_commit(config: RunConfig) -> str | None:
    """The commit of the hub that the base was resolved to; None for a directory of the user's own."""
    _, commit = hub_name(str(weights_directory(config.model)))
    return commit
