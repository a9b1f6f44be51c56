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

from strategies.atomic_io import error_summary
from strategies.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.export.tensors import hub_id_and_commit
from trainer.model.base_files import changed_file_lines, digests_of_loaded_files, model_file_digests
from trainer.model.config import ModelConfig
from trainer.model.loading import find_weights_directory
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.registry import objective_family
from trainer.reporting.run_record import readable_run_record
from trainer.tuning.base import LoraConfig
from trainer.tuning.table import rewrites_base

IDENTITY_FILE = "identity.json"
BASE_KIND = "base"
"""The kind of difference that `accept=[base]` accepts. `identity.json` has the digests under this kind."""
BASE_ROLE = "base"
TEACHER_ROLE = "teacher"
INITIAL_ADAPTER_ROLE = "tuning.from"
"""What a file is for: the base, the teacher, or the adapter that training began from. A key of the digests is `<role>/<file>`."""


def base_file_digests(config: RunConfig, *, with_teacher: bool = True) -> dict[str, str]:
    """Digest the files that a run's model is made of (base, adapters and teacher), such as {"base/config.json": "ab12"}.

    A key is `<role>/<file name>`. The roles are `base`, `teacher`, `tuning.from` and `adapter 0`, `adapter 1`, ...
    `with_teacher`: whether the teacher's files are read too. Raises ConfigError for a base that is not on this machine, OSError
    for a file that cannot be read.
    """
    directory_by_role = {BASE_ROLE: find_weights_directory(config.model)}
    if with_teacher:
        teacher = teacher_model(config.model, config.objective)
        if teacher is not None:
            directory_by_role[TEACHER_ROLE] = find_weights_directory(teacher)
    initial_adapter = getattr(config.tuning, "from_", None)  # other methods than adapters have no `tuning.from`
    if initial_adapter:
        directory_by_role[INITIAL_ADAPTER_ROLE] = Path(initial_adapter).expanduser()
    for number, path in enumerate(config.model.adapters):
        directory_by_role[f"adapter {number}"] = Path(path).expanduser()
    digests: dict[str, str] = {}
    for role, directory in directory_by_role.items():
        for name, digest in model_file_digests(directory).items():
            digests[f"{role}/{name}"] = digest
    return digests


def recorded_file_digests(run_dir: Path) -> dict[str, str]:
    """Read the digests of the model files when the run was last started, by `<role>/<file>`. Raises ConfigError if unreadable."""
    path = run_dir / IDENTITY_FILE
    try:
        base_identity = json.loads(path.read_text(encoding="utf-8"))[BASE_KIND]
        return file_digests_among(base_identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), and it alone says which base the run was trained on; bring the file back, or "
            f"continue with the base that lies there now: accept=[{BASE_KIND}]"
        ) from error


def file_digests_among(base_identity: dict[str, str]) -> dict[str, str]:
    """The digests of files among the values that `identity.json` has of the kind `base`: their keys contain a slash."""
    return {name: digest for name, digest in base_identity.items() if "/" in name}


def base_difference_lines(
    config: RunConfig, recorded_digests: dict[str, str], *, with_teacher: bool, needs_initial_model: bool
) -> list[str]:
    """Compare a run's model files with those that lie there now: a line for each file that differs. No collective.

    An export or an evaluation reads the base again, perhaps months later, when somebody may have replaced it.

    `recorded_digests`: what `base_file_digests` gave when the run was started, such as {"base/config.json": "ab12"}.
    `with_teacher`: whether the teacher's files matter too; not for an export, which has nothing of a teacher.
    `needs_initial_model`: whether the model before training is needed, so that the adapter from which training began matters.

    Files that cannot be found or read are a difference, too.
    """
    try:
        present_digests = base_file_digests(config, with_teacher=with_teacher)
        base_dir = find_weights_directory(config.model)
        recorded_loadable = _without_unloaded_base_files(recorded_digests, base_dir)
        present_loadable = _without_unloaded_base_files(present_digests, base_dir)
    except ConfigError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename}: cannot be read ({error_summary(error)})"]
    prefixes_not_needed = []
    if not with_teacher:
        prefixes_not_needed.append(f"{TEACHER_ROLE}/")
    if not _needs_initial_adapter(config, with_teacher=with_teacher, needs_initial_model=needs_initial_model):
        prefixes_not_needed.append(f"{INITIAL_ADAPTER_ROLE}/")
    recorded_needed = _without_prefixes(recorded_loadable, prefixes_not_needed)
    present_needed = _without_prefixes(present_loadable, prefixes_not_needed)
    return changed_file_lines(recorded_needed, present_needed)


def _without_unloaded_base_files(digests: dict[str, str], base_dir: Path) -> dict[str, str]:
    """Leave out of a run's digests the files of the base model that its loader does not read, such as weights in a second format.

    `digests`: by `<role>/<file name>`; a role says what a file is for (`base`, `teacher`). Files of other roles stay.
    `base_dir`: where the base model's files are.

    Raises ConfigError.
    """
    base_prefix = f"{BASE_ROLE}/"
    base_digests = {}
    for key, digest in digests.items():
        if key.startswith(base_prefix):
            base_digests[key.removeprefix(base_prefix)] = digest
    loaded_digests = _without_prefixes(digests, [base_prefix])
    for file_name, digest in digests_of_loaded_files(base_digests, base_dir).items():
        loaded_digests[f"{base_prefix}{file_name}"] = digest
    return loaded_digests


def _without_prefixes(digests: dict[str, str], prefixes: list[str]) -> dict[str, str]:
    """The digests of those files whose names begin with none of the prefixes."""
    return {name: digest for name, digest in digests.items() if not name.startswith(tuple(prefixes))}


def _needs_initial_adapter(config: RunConfig, *, with_teacher: bool, needs_initial_model: bool) -> bool:
    """Whether the adapter that `tuning.from` names is still needed once the run has a checkpoint.

    A checkpoint has every tensor of plain LoRA, since all are trained. So the adapter's own files are needed only for the model
    before training: if `needs_initial_model`, or if the objective compares with it (which an export, without `with_teacher`, does
    not compute). Other methods read tensors from the adapter's file that no checkpoint has, and PiSSA and OLoRA read the part
    that they split off the base.
    """
    checkpoint_has_all_tensors = isinstance(config.tuning, LoraConfig) and not rewrites_base(config.tuning.init)
    if not checkpoint_has_all_tensors:
        return True
    family = objective_family(config.objective)
    compares_with_initial_model = family.compares_distributions(config.objective) or family.compares_with_initial_model(
        config.objective
    )
    return needs_initial_model or (with_teacher and compares_with_initial_model)


def pin_and_check_recorded_base(
    config: RunConfig,
    run_dir: Path,
    accept: Collection[str],
    *,
    with_teacher: bool,
    needs_initial_model: bool = False,
) -> list[str]:
    """Pin `config` to the base that the run in `run_dir` was trained on, and check that the base's files are still the same.

    Sets `config.model.revision` of a hub id to the commit that the run resolved it to. Returns the differences that were
    accepted, as lines.

    `accept`: kinds of differences that the user accepts, such as ["base"].
    `with_teacher`: whether the files of the teacher, from which a distilled model learns, are compared too.
    `needs_initial_model`: whether the model before training is needed, so that the adapter it began from is compared too.

    Raises ConfigError, with a line for each file, if the base is another one and `accept` has no `base`; and for a base that is
    not on this machine.
    """
    pin_base_to_recorded_commit(config, run_dir)
    find_weights_directory(config.model)  # a missing base is an error that `accept` does not cover
    try:
        recorded_digests = recorded_file_digests(run_dir)
    except ConfigError as error:
        if BASE_KIND in accept:
            return [f"{BASE_KIND}: {run_dir.name}/{IDENTITY_FILE} could not be read, and the base was taken as it was"]
        raise error
    changed_lines = base_difference_lines(
        config, recorded_digests, with_teacher=with_teacher, needs_initial_model=needs_initial_model
    )
    if not changed_lines:
        return []
    if BASE_KIND in accept:
        return [f"{BASE_KIND}: {line}" for line in changed_lines]
    refusal = (
        f"{run_dir}: its base is not the one that it was trained on (base: {config.model.path}). Bring these files back, "
        f"or continue with what lies there now: accept=[{BASE_KIND}]"
    )
    raise ConfigError("\n    ".join([refusal, *changed_lines]))


def pin_base_to_recorded_commit(config: RunConfig, run_dir: Path, *, may_fetch: bool = True) -> None:
    """Take a hub model at the commit that the run in `run_dir` was trained on, if the run's record has it.

    `may_fetch`: False for a command that only shows something: a model whose snapshot would have to be fetched from the hub is
    left as it is.
    """
    commit = readable_run_record(run_dir).base_commit  # None too if the record cannot be read
    if commit is None:  # the model is a directory, or the run ended before its record was written
        return
    if may_fetch:
        config.model = pin_model_to_commit(config.model, commit)
        return
    with contextlib.suppress(ConfigError):  # raised if this machine does not have the snapshot
        pinned = pin_model_to_commit(replace(config.model, download=False), commit)
        config.model = replace(pinned, download=config.model.download)


def pin_model_to_commit(model: ModelConfig, commit: str | None) -> ModelConfig:
    """The settings of a hub model, pinned to one of its commits. A directory, or a revision that the user set, stays as it is.

    If this machine has that commit, it is taken. If the tokenizer is of another repository, which does not have the commit, the
    model is named by its snapshot directory instead. If this machine has only another commit, the revision stays open: a new
    commit mostly has the same weights, and the digests tell.
    """
    has_other_revision = model.revision not in (None, commit)
    is_directory = Path(str(model.path)).expanduser().is_dir()
    if commit is None or has_other_revision or is_directory:
        return model
    pinned = replace(model, revision=commit)
    try:
        snapshot = find_weights_directory(replace(pinned, download=False))
    except ConfigError:  # this machine does not have the commit
        # A model that runs code of its repository is only taken at the run's own commit.
        must_be_pinned = (model.download and model.tokenizer is None) or model.trust_remote_code
        return pinned if must_be_pinned else replace(model, revision=None)
    if model.tokenizer is None:
        return pinned
    return replace(model, path=str(snapshot))


def base_commit(config: RunConfig) -> str | None:
    """The commit of the hub that the base was resolved to; None for a directory of the user's own."""
    _, commit = hub_id_and_commit(str(find_weights_directory(config.model)))
    return commit
