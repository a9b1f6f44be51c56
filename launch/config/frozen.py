"""The frozen configuration: its identity, its text, and how it differs from the one in a run directory.

A directory belongs to one identity. The same identity resumes it; another one is an error that lists what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.choices import settings_class_of, settings_classes_by_group
from strategies.errors import ConfigError
from trainer.config.resuming import flatten_settings, settings_as_dict
from trainer.config.run import (
    MICRO_BATCH_KEY,
    RunConfig,
    requested_micro_batch,
    requested_strategy,
)
from trainer.data.config import identifying_data_settings
from trainer.export.config import ExportedCheckpoint
from trainer.reporting import settings_file
from trainer.reporting.status import CONFIG_SHA256_REGEX, RunState, read_status, write_text_atomic
from trainer.tuning.config import PrefixConfig, PrefixInit

EXPORTED_CHECKPOINT_KEY = "export.checkpoint"
"""The setting of `export` that decides no result: which checkpoint of a run is exported changes none of them."""
GROUPS_WITHOUT_EFFECT_ON_RESULT = ("logging", "profile", "launcher", "gates", "review", "challenges", "substitutions")
"""Groups that do not decide the result of a run."""
OPERATIONAL_PREFIXES = ("strategy.", "parallel.", "checkpoint.")
"""Groups that say how a run is computed and how often it is saved, which changes no result."""
OPERATIONAL_KEYS = (
    MICRO_BATCH_KEY,
    "data.workers",
    "data.verify",
    "evaluation.judge.parallel",
    "evaluation.judge.retries",
    "evaluation.judge.timeout_s",
    "evaluation.server.parallel",
    "evaluation.server.retries",
    "evaluation.server.timeout_s",
)
"""Single settings of the same kind."""


@dataclass(frozen=True, slots=True)
class ComposedConfig:
    """The configuration of a run, with the command-line overrides that it was composed from."""

    config: RunConfig
    overrides: list[str]
    """The overrides, as typed."""

    @property
    def sha256(self) -> str:
        """Identity of the run, as its settings are now: see `config_sha256` for what it leaves out."""
        return config_sha256(self.config)

    @property
    def yaml(self) -> str:
        """The whole configuration, defaults included, as YAML."""
        return config_yaml(self.config)


def config_sha256(config: RunConfig) -> str:
    """SHA-256 of the settings that decide the result of a run, by which a run directory knows the command that it belongs to.

    Left out: `run.*` except for the seed, the groups of `GROUPS_WITHOUT_EFFECT_ON_RESULT`, and the substitutions. Where a run is
    started, how it is called, what it reports and what its export must pass may change when it is requeued or resumed.
    """
    return _settings_sha256(_identifying_settings(settings_as_dict(config)))


def config_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings_as_dict(config)))


def default_run_dir(sha256: str) -> Path:
    """runs/<hash>-<SLURM job id or start time>: a requeued job finds its directory again."""
    return Path("runs") / f"{sha256[:8]}-{os.environ.get('SLURM_JOB_ID') or time.strftime('%Y%m%d-%H%M%S')}"


def is_finished(run_dir: Path) -> bool:
    """Whether the run in this directory is done, so that starting it again is a no-op."""
    return read_status(run_dir).get("state") == RunState.done


def rewrite_config_with_own_choices(run_dir: Path, config: RunConfig) -> None:
    """Rewrite a run's `config.yaml` after the run has chosen settings itself, such as its micro-batch; it stays the same run.

    `config`: the settings with these choices.
    A file of an earlier version lacks the settings that were added since. They are written with their defaults, so the hash in
    its head becomes that of the same settings in this version.
    Raises ConfigError if the file cannot be read, StorageError if it cannot be written.
    """
    path = run_dir / "config.yaml"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); is it still there?") from error
    # The comments in the head: who wrote the file, the hash, and the overrides.
    header = "".join(line for line in content.splitlines(keepends=True)[:3] if line[0] == "#")
    # The hash of the settings that decide the run's result, when the file was written.
    recorded_hash = CONFIG_SHA256_REGEX.search(header)
    # The file is loaded only if it must be, because that takes a tenth of a second. If it has all settings, its hash stays right.
    if recorded_hash is not None and not _is_complete_and_unedited(path, content, config, recorded_hash[1]):
        header = header.replace(recorded_hash[1], config_sha256(load_frozen_config(path)))
    write_text_atomic(path, header + config_yaml(config))


def _is_complete_and_unedited(path: Path, content: str, config: RunConfig, recorded_hash: str) -> bool:
    """Whether a run's `config.yaml` was not edited and lacks no setting of this version, so that its recorded hash stays right.

    `content`: the text of the file.
    `config`: the configuration of the same run in this version.
    `recorded_hash`: that in the head of the file.
    An edited file has another hash than the recorded one, a file that lacks settings another than `config`.
    """
    try:
        hash_of_content = _settings_sha256(_identifying_settings(settings_file.parse_settings_tree(path, content)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return recorded_hash == hash_of_content == config_sha256(config)


def load_frozen_config(path: Path | str) -> RunConfig:
    """Load the configuration that a run was frozen into at its start, its `config.yaml`, and check that nobody edited it.

    Settings that the file lacks have their defaults, except for two that were added later, which get the value that all runs had
    before. Raises ConfigError if the file is missing, is of another version, or was edited, so that the hash in its head differs.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    text = settings_file.read_settings_text(path)
    recorded_hash = CONFIG_SHA256_REGEX.search(text)
    raw = settings_file.parse_settings_tree(path, text)
    try:
        tree = OmegaConf.structured(RunConfig)
        # A group such as `tuning` has another dataclass for each choice, which the file names.
        for group in settings_classes_by_group():
            tree[group] = OmegaConf.structured(settings_class_of(group, raw[group]["name"]))
        config: Any = OmegaConf.to_object(OmegaConf.merge(tree, settings_file.escape_interpolations(raw)))
        # What was done before there were these settings.
        if "checkpoint" not in raw.get("export", {}):
            config.export.checkpoint = ExportedCheckpoint.last
        if isinstance(config.tuning, PrefixConfig) and "init" not in raw["tuning"]:
            config.tuning.init = PrefixInit.random
        # The hash is of what the file says, because this version may have more settings that decide the result.
        sha256 = _settings_sha256(_identifying_settings(raw))
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a configuration of this version ({' '.join(str(error).split())})") from error
    if recorded_hash is None or recorded_hash[1] != sha256:
        raise ConfigError(
            f"{path}: was changed after the run began (its hash differs); start a new run in another run.dir"
        )
    return config


@dataclass(frozen=True, slots=True)
class DifferingSetting:
    """A setting that a command and the run in its directory have with different values; `-` stands for a missing one."""

    key: str
    value_in_run_dir: Any
    value_in_command: Any

    def __str__(self) -> str:
        value_in_run_dir = "null" if self.value_in_run_dir is None else self.value_in_run_dir
        value_in_command = "null" if self.value_in_command is None else self.value_in_command
        return f"{self.key}: {value_in_run_dir} there, {value_in_command} here"

    @property
    def is_missing_on_one_side(self) -> bool:
        """Whether one of the two configurations lacks the setting, such as a setting of ZeRO under FSDP."""
        return "-" in (self.value_in_run_dir, self.value_in_command)

    @property
    def is_operational(self) -> bool:
        """Whether the setting says how the run is computed and saved, and not what: a run that is not done resumes with it.

        False for another `checkpoint.fallback_dir` in place of an earlier one: the newest checkpoint may lie there, and the run
        would resume from an older one without a word.
        """
        if self.key == "checkpoint.fallback_dir" and self.value_in_run_dir is not None:
            return False
        return self.key in OPERATIONAL_KEYS or self.key.startswith(OPERATIONAL_PREFIXES)


def differing_settings(command_config: RunConfig, run_dir_config: RunConfig) -> list[DifferingSetting]:
    """The settings that decide a run's result and differ between a command and the run in its directory, in alphabetical order.

    Empty if they are the same run. Strategy and micro-batch are compared as they were asked for, `auto` and not what was chosen.
    """
    command_values = flatten_settings(_identifying_settings(settings_as_dict(command_config)))
    run_dir_values = flatten_settings(_identifying_settings(settings_as_dict(run_dir_config)))
    missing = object()  # None is a value
    differing = []
    for key in sorted(command_values.keys() | run_dir_values.keys()):
        if command_values.get(key, missing) != run_dir_values.get(key, missing):
            setting = DifferingSetting(
                key, value_in_run_dir=run_dir_values.get(key, "-"), value_in_command=command_values.get(key, "-")
            )
            differing.append(setting)
    return differing


def _identifying_settings(tree: Any) -> dict[str, Any]:
    """The part of a configuration that decides a run's result, as nested dictionaries. `tree`: the whole configuration.

    Its hash is the identity of the run and stands in its `config.yaml`, so a change here would make earlier runs other runs.
    """
    identifying_tree = {key: value for key, value in tree.items() if key not in GROUPS_WITHOUT_EFFECT_ON_RESULT}
    # What was asked for, and not what the run has resolved `auto` to, because it is still the same run.
    identifying_tree["batch"] = {**tree["batch"], "micro": requested_micro_batch(tree["batch"], tree["substitutions"])}
    identifying_tree["strategy"] = requested_strategy(tree["strategy"], tree["substitutions"])
    # `control_tokens=auto` counts as `text`, which is what earlier runs did without the setting.
    identifying_tree["data"] = identifying_data_settings(tree["data"])
    if "teacher" in tree["objective"]:
        # Whether the teacher's code may run decides no result, and earlier runs did not record it.
        teacher = dict(tree["objective"]["teacher"])
        teacher.pop("trust_remote_code", None)
        identifying_tree["objective"] = {**tree["objective"], "teacher": teacher}
    # Earlier versions had no choice of the checkpoint that is exported.
    identifying_tree["export"] = {key: value for key, value in tree["export"].items() if key != "checkpoint"}
    identifying_tree["run"] = {"seed": tree["run"]["seed"]}
    return identifying_tree


def _settings_sha256(tree: dict[str, Any]) -> str:
    """SHA-256 of settings as JSON. The order of keys does not count."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
