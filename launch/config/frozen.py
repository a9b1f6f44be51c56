"""The frozen configuration: its identity, its text, and how it differs from the one in a run directory.

A directory belongs to one identity. The same identity resumes it; another one is an error that lists what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from launch.config.choices import settings_class_of, settings_classes
from launch.config.learning_rate import keep_rate
from launch.config.trusted_values import is_remembered
from launch.config.user_files import user_files_may_apply
from strategies.errors import ConfigError
from strategies.matmul import Matmul
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.config.resuming import flat, plain
from trainer.config.run import (
    AUTO,
    MATMUL,
    MICRO,
    STRATEGY,
    TEMPLATE_DATE,
    RunConfig,
    asked_micro,
    asked_strategy,
    kept_matmul,
)
from trainer.data.config import ControlTokens, identifying
from trainer.data.tokens.clock import TemplateDate
from trainer.evaluation.interval import EVERY_STEPS
from trainer.export.config import ExportedCheckpoint
from trainer.reporting import settings_file
from trainer.reporting.resolution import Resolution
from trainer.reporting.status import FROZEN, State, read_status, write_text_atomic
from trainer.tuning.config import PrefixConfig, PrefixInit

SHOWN_DIFFERENCES = 12
"""Settings that an error lists before it only counts the others."""
EXPORTED_CHECKPOINT = "export.checkpoint"
"""The setting of `export` that decides no result: which of a run's checkpoints leaves it changes none of them."""
NOT_IDENTIFYING = ("logging", "profile", "launcher", "gates", "review", "challenges", "substitutions")
"""Groups that do not decide the result of a run."""
RECORDED_OVERRIDES = re.compile(r"^# overrides: (.*)$", re.MULTILINE)
"""The comment in the head of a `config.yaml` with the overrides that the run was composed from."""


@dataclass(frozen=True, slots=True)
class Composed:
    """The configuration of a run, with the command-line overrides that it was composed from."""

    config: RunConfig
    overrides: list[str]
    """The overrides, as typed."""

    @property
    def sha256(self) -> str:
        """Identity of the run, as its settings are now: see `identity` for what it leaves out."""
        return identity(self.config)

    @property
    def yaml(self) -> str:
        """The whole configuration, defaults included, as YAML."""
        return to_yaml(self.config)


def identity(config: RunConfig) -> str:
    """SHA-256 of the settings that decide the result of the run.

    Left out: `run.*` except for the seed, the groups of `NOT_IDENTIFYING`, and the substitutions. Where a run is started, how it
    is called, what it reports and what its export must pass may change when it is requeued or resumed.
    """
    return _hash(_identifying_settings(plain(config)))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def default_run_dir(sha256: str) -> Path:
    """runs/<hash>-<SLURM job id or start time>: a requeued job finds its directory again."""
    return Path("runs") / f"{sha256[:8]}-{os.environ.get('SLURM_JOB_ID') or time.strftime('%Y%m%d-%H%M%S')}"


def is_finished(run_dir: Path) -> bool:
    """Whether the run in this directory is done, so that starting it again is a no-op."""
    return read_status(run_dir).get("state") == State.done


def freeze_choices(run_dir: Path, config: RunConfig) -> None:
    """Rewrite a run's `config.yaml` with what the run has chosen itself, such as its micro-batch; it stays the same run.

    A file of an earlier version lacks the settings that were added since. They are written with their defaults, so the hash
    in its head becomes that of the same settings in this version. Errors: ConfigError, StorageError.
    """
    path = run_dir / "config.yaml"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); is it still there?") from error
    # The comments in the head: who wrote the file, the hash, and the typed overrides.
    header = "".join(line for line in content.splitlines(keepends=True)[:3] if line[0] == "#")
    recorded_hash = FROZEN.search(header)
    # To load the file takes a tenth of a second, and every start chooses something.
    if recorded_hash is not None and not _has_all_settings(path, content, config, recorded_hash[1]):
        header = header.replace(recorded_hash[1], identity(load_frozen(path)))
    write_text_atomic(path, header + to_yaml(config))


def _has_all_settings(path: Path, content: str, config: RunConfig, recorded_hash: str) -> bool:
    """Whether a frozen file is as it was written, and lacks no setting of this version's `config`, the same run's.

    `content`: of the file. If it lacks one, or was changed, its hash or the recorded one is another than the configuration's.
    """
    try:
        hash_of_content = _hash(_identifying_settings(settings_file.tree_of(path, content)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return recorded_hash == hash_of_content == identity(config)


def load_frozen(path: Path | str) -> RunConfig:
    """The configuration in a frozen `config.yaml`. Errors: ConfigError if it is missing, was edited, or is of another version.

    That it was edited shows by the hash in its head. What the file lacks has its default; of two settings that were added later,
    the value that runs had before.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    text = settings_file.read_text(path)
    recorded_hash = FROZEN.search(text)
    raw = settings_file.tree_of(path, text)
    try:
        tree = OmegaConf.structured(RunConfig)
        for group in settings_classes():
            tree[group] = OmegaConf.structured(settings_class_of(group, raw[group]["name"]))
        config: Any = OmegaConf.to_object(OmegaConf.merge(tree, settings_file.literal(raw)))
        # Settings that were added later, with what was done before there was a choice.
        if "checkpoint" not in raw.get("export", {}):
            config.export.checkpoint = ExportedCheckpoint.last
        if isinstance(config.tuning, PrefixConfig) and "init" not in raw["tuning"]:
            config.tuning.init = PrefixInit.random
        # Hash what the file says, not what this version makes of it: a later version may know more settings.
        sha256 = _hash(_identifying_settings(raw))
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a configuration of this version ({' '.join(str(error).split())})") from error
    if recorded_hash is None or recorded_hash[1] != sha256:
        raise ConfigError(
            f"{path}: was changed after the run began (its hash differs); start a new run in another run.dir"
        )
    return config


@dataclass(frozen=True, slots=True)
class DifferingSetting:
    """A setting that two configurations have with different values. A value is `-` if one of them lacks the setting."""

    key: str
    value_in_run_dir: Any
    value_in_command: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.value_in_run_dir} there, {self.value_in_command} here"

    @property
    def is_about_computation(self) -> bool:
        """Whether the setting says how the run is computed, and not what: a run that is not done may go on with another value."""
        return self.key == MICRO or self.key.startswith(("strategy.", "parallel."))


def differences(ours: RunConfig, theirs: RunConfig) -> list[DifferingSetting]:
    """The settings that decide a run's result and differ between this command (`ours`) and a run directory (`theirs`)."""
    our_values = flat(_identifying_settings(plain(ours)))
    their_values = flat(_identifying_settings(plain(theirs)))
    missing = object()  # None is a value
    differing = []
    for key in sorted(our_values.keys() | their_values.keys()):
        if our_values.get(key, missing) != their_values.get(key, missing):
            differing.append(DifferingSetting(key, their_values.get(key, "-"), our_values.get(key, "-")))
    return differing


def resume_or_refuse(composed: Composed, path: Path, *, has_progress: bool, may_change_strategy: bool) -> None:
    """Compare a command with the run whose `config.yaml` is at `path`: refuse another run, and prepare to resume the same one.

    Changes `composed.config`: of the same run, it takes over what that run chose itself. `has_progress`: the directory has a
    checkpoint or is finished. `may_change_strategy`: the run may resume with another strategy or micro-batch. The cases, once
    settings that differ by new defaults alone are put back:
    - No setting differs: the run resumes.
    - The directory has no progress: another command may take its place.
    - Only settings of computation differ, with `may_change_strategy`: the run resumes, and a line says so.
    - Else: ConfigError, which names the settings.
    A `config.yaml` that cannot be read raises ConfigError if there is progress, and counts as another command's if not.
    """
    config = composed.config
    try:
        before = load_frozen(path)
    except ConfigError as error:
        if not has_progress:
            return
        if FROZEN.search(path.read_text(encoding="utf-8", errors="replace")) is None:
            raise ConfigError(
                f"{path}: is torn, as by a power cut; delete it, and the same command writes it again and continues"
            ) from error
        raise
    if has_progress:
        keep_rate(config, before)
        _keep_exported_checkpoint(composed, before)
        if _keep_evaluation_interval(composed, before):
            interval = DifferingSetting(EVERY_STEPS, 0, AUTO)
            print(f"{path.parent}: keeps the defaults that it began with: {interval}", file=sys.stderr)
    changed = differences(config, before)
    if changed and has_progress and _only_defaults_changed(composed, changed, before, path):
        _copy_identifying(config, before)
        print(f"{path.parent}: keeps the defaults that it began with: {_join_differences(changed)}", file=sys.stderr)
        changed = []
    # What the run resolved at its first start decides results, so it holds whatever else may change.
    if not changed or may_change_strategy:
        _keep_matmul(config, before)
        _keep_template_date(config, before, path.parent, has_progress=has_progress)

    if not changed:
        _keep_own_choices(config, before)
        if has_progress:
            _keep_control_tokens(config, before)
        return
    if not has_progress:
        return
    if may_change_strategy and all(difference.is_about_computation for difference in changed):
        print(f"{path.parent}: resumes in another way: {_join_differences(changed)}", file=sys.stderr)
        return
    raise ConfigError(_different_run_message(path.parent, changed))


def _join_differences(changed: list[DifferingSetting]) -> str:
    """All differing settings in one line, for messages."""
    return "; ".join(str(difference) for difference in changed)


def _different_run_message(run_dir: Path, changed: list[DifferingSetting]) -> str:
    """The error message for a command whose directory holds another run: one problem of several lines."""
    refusal = (
        f"run.dir={run_dir}: already holds a run with different settings; use another run.dir (to start from its "
        f"state: run.resume={run_dir}/checkpoints/<step>), or change these back:"
    )
    lines = [refusal, *(str(difference) for difference in changed[:SHOWN_DIFFERENCES])]
    if len(changed) > SHOWN_DIFFERENCES:
        lines.append(f"and {len(changed) - SHOWN_DIFFERENCES} more")
    return "\n    ".join(lines)


def _keep_own_choices(config: RunConfig, before: RunConfig) -> None:
    """Take over the micro-batch and the strategy that the run chose itself: they are chosen once."""
    if MICRO in before.substitutions:
        config.batch["micro"] = before.batch["micro"]
        config.substitutions[MICRO] = before.substitutions[MICRO]
    if STRATEGY in before.substitutions:
        config.strategy = before.strategy
        config.substitutions[STRATEGY] = before.substitutions[STRATEGY]


def keep_earlier_defaults(composed: Composed, run_dir: Path) -> None:
    """Give `composed.config` the defaults that the run in `run_dir` began with, if shardtune's defaults have changed since.

    For ranks that compose the run themselves, under torchrun: rank 0 does the same when it freezes the run, and all ranks must
    train the same. Writes nothing. Errors: ConfigError.
    """
    path = run_dir / "config.yaml"
    has_checkpoint = bool(checkpoints_in(checkpoint_dirs_of(run_dir, composed.config.checkpoint.fallback_dir)))
    if not path.exists() or not (has_checkpoint or is_finished(run_dir)):
        return
    before = load_frozen(path)
    keep_rate(composed.config, before)
    _keep_exported_checkpoint(composed, before)
    _keep_evaluation_interval(composed, before)
    changed = differences(composed.config, before)
    if changed and _only_defaults_changed(composed, changed, before, path):
        _copy_identifying(composed.config, before)
    if not changed:
        _keep_control_tokens(composed.config, before)


def keep_rate_of_checkpoint(config: RunConfig) -> None:
    """Give a run that starts from a checkpoint (`run.resume=<directory>`) the rate of that run, if neither was set by hand."""
    if config.run.resume in ("auto", "never"):
        return
    checkpoint = Path(config.run.resume).expanduser().absolute()
    # Two levels above <run>/checkpoints/step-000005, or three above <run>/checkpoints/given-up-1/step-000005.
    for run_dir in list(checkpoint.parents)[1:3]:
        if (run_dir / "config.yaml").is_file():
            with suppress(ConfigError):  # what is wrong with the file is said when the checkpoint is read
                keep_rate(config, load_frozen(run_dir / "config.yaml"))
            return


def _only_defaults_changed(composed: Composed, changed: list[DifferingSetting], before: RunConfig, path: Path) -> bool:
    """Whether settings differ only because shardtune changed a default: the user typed the same arguments as for `before`.

    False if the arguments alone do not decide the settings: a file of the user's, a variable of the environment, or a value that
    this machine chose may have changed as well. False too if a value of `before` reaches out (a file, address or code) that this
    user never typed. `changed`: the settings that differ. `path`: of the `config.yaml` of `before`.
    """
    overrides = _identifying_overrides(composed.overrides)
    if not has_same_overrides(composed.overrides, path):
        return False
    # `${oc.env:NAME}` may mean another value today, and a file may have been edited.
    has_interpolation = any("${" in override for override in overrides)
    if has_interpolation or user_files_may_apply(overrides):
        return False
    if _adds_outside_values(before, composed.config):
        return False
    chosen_by_machine = {*composed.config.substitutions, *before.substitutions}
    return not any(difference.key in chosen_by_machine for difference in changed)


def _adds_outside_values(before: RunConfig, config: RunConfig) -> bool:
    """Whether the settings of `before` hold a file, address or code that this user never typed, and that would be taken over.

    The overrides in the head of a `config.yaml` prove nothing: whoever wrote the directory wrote them too.
    """
    from launch.config.outside_values import outside_values

    typed_values = outside_values(config)
    for value in outside_values(before):
        is_taken_over = any(key.partition(".")[0] not in NOT_IDENTIFYING for key in value.settings)
        if is_taken_over and value not in typed_values and not is_remembered(value.identity):
            return True
    return False


def has_same_overrides(overrides: list[str], path: Path) -> bool:
    """Whether the `config.yaml` at `path` was composed from the same overrides, but for those that decide no result."""
    return _identifying_overrides(overrides) == _identifying_overrides(_recorded_overrides(path))


def _copy_identifying(config: RunConfig, before: RunConfig) -> None:
    """Give `config` every identifying setting of `before`, with the notes on what that run chose itself."""
    exported_checkpoint = config.export.checkpoint
    for group in fields(RunConfig):
        if group.name not in (*NOT_IDENTIFYING, "run"):
            setattr(config, group.name, getattr(before, group.name))
    config.export = replace(before.export, checkpoint=exported_checkpoint)
    config.run.seed = before.run.seed
    for key in (MICRO, STRATEGY):
        if key in before.substitutions:
            config.substitutions[key] = before.substitutions[key]


def _identifying_overrides(overrides: list[str]) -> set[str]:
    """The overrides that decide a run's result: without those of `NOT_IDENTIFYING`, and of `run.*` the seed alone."""
    identifying = set()
    for override in overrides:
        key = _key_of_override(override)
        group = key.partition(".")[0]
        is_identifying = group not in (*NOT_IDENTIFYING, "run") and key != EXPORTED_CHECKPOINT
        if is_identifying or key == "run.seed":
            identifying.add(override)
    return identifying


def _key_of_override(override: str) -> str:
    """The setting or group that an override of the command line names."""
    return override.lstrip("+~").partition("=")[0]


def _recorded_overrides(path: Path) -> list[str]:
    """The overrides that `freeze` noted in the head of a `config.yaml`; empty if there are none."""
    match = RECORDED_OVERRIDES.search(settings_file.read_text(path))
    if match is None:
        return []
    # JSON strings with blanks between them, since an override may hold blanks itself.
    decoder = json.JSONDecoder()
    json_overrides = match[1]
    overrides = []
    start = 0
    while start < len(json_overrides):
        override, end = decoder.raw_decode(json_overrides, start)
        overrides.append(str(override))
        start = end + 1
    return overrides


def _keep_template_date(config: RunConfig, before: RunConfig, run_dir: Path, *, has_progress: bool) -> None:
    """Give `config` the date that the chat template wrote for "today" at the first start of the run, if it writes one.

    Prepared data depends on the date. A run of an earlier version has not recorded it, so the oldest file of the run tells the
    day; the fingerprint of such a run's data holds no date.
    """
    if TEMPLATE_DATE in before.substitutions:
        config.substitutions[TEMPLATE_DATE] = before.substitutions[TEMPLATE_DATE]
    elif has_progress:
        oldest_s = time.time()  # seconds since 1970
        for file in run_dir.rglob("*"):
            with suppress(OSError):  # removed meanwhile
                oldest_s = min(oldest_s, file.stat().st_mtime)
        template_date = TemplateDate(date.fromtimestamp(oldest_s), in_fingerprint=False)
        config.substitutions[TEMPLATE_DATE] = str(template_date)


def _keep_matmul(config: RunConfig, before: RunConfig) -> None:
    """Keep the library of float32 products that the run began with, unless the overrides name one."""
    library = kept_matmul(before)
    if config.run.matmul is not Matmul.auto or library is Matmul.auto:
        return
    recorded = before.resolution(MATMUL)
    config.substitutions[MATMUL] = recorded or Resolution(MATMUL, AUTO, str(library), "as this run began")


def _keep_control_tokens(config: RunConfig, before: RunConfig) -> None:
    """Keep how control tokens in texts are read. Prepared bytes depend on it, and `auto` may mean something else by now."""
    if config.data.control_tokens is ControlTokens.auto:
        config.data.control_tokens = before.data.control_tokens


def _keep_exported_checkpoint(composed: Composed, before: RunConfig) -> None:
    """Keep which checkpoint the run exports, unless the overrides say it.

    So a run of a version without the setting goes on to export its last one.
    """
    if composed.config.export.checkpoint is ExportedCheckpoint.auto and not _is_typed(EXPORTED_CHECKPOINT, composed):
        composed.config.export.checkpoint = before.export.checkpoint


def _keep_evaluation_interval(composed: Composed, before: RunConfig) -> bool:
    """Set that a run is evaluated only at its start and end if it began so, unless typed otherwise; returns whether it was set.

    That was the default of earlier versions. A run for which somebody typed a number of steps is another run than one without.
    """
    evaluation = composed.config.evaluation
    differs = evaluation.every_steps == AUTO and before.evaluation.every_steps == 0
    if not differs or _is_typed(EVERY_STEPS, composed):
        return False
    evaluation.every_steps = 0
    return True


def _is_typed(key: str, composed: Composed) -> bool:
    """Whether the overrides of the command say this setting."""
    return any(_key_of_override(override) == key for override in composed.overrides)


def _identifying_settings(tree: Any) -> dict[str, Any]:
    """The settings that decide a run's result, of a whole configuration as nested dictionaries."""
    identifying_tree = {key: value for key, value in tree.items() if key not in NOT_IDENTIFYING}
    # What was asked for, and not what the run made of `auto`: it is still the same run.
    identifying_tree["batch"] = {**tree["batch"], "micro": asked_micro(tree["batch"], tree["substitutions"])}
    identifying_tree["strategy"] = asked_strategy(tree["strategy"], tree["substitutions"])
    identifying_tree["data"] = identifying(tree["data"])
    if "teacher" in tree["objective"]:
        # Whether the teacher's code may run decides no result, and earlier runs did not record it.
        teacher = dict(tree["objective"]["teacher"])
        teacher.pop("trust_remote_code", None)
        identifying_tree["objective"] = {**tree["objective"], "teacher": teacher}
    # Earlier versions had no choice of the checkpoint that is exported.
    identifying_tree["export"] = {key: value for key, value in tree["export"].items() if key != "checkpoint"}
    identifying_tree["run"] = {"seed": tree["run"]["seed"]}
    return identifying_tree


def _hash(tree: dict[str, Any]) -> str:
    """SHA-256 of settings as JSON. The order of keys does not count."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
