"""Resumes a run: tells whether a command is that of the run in a directory, and keeps what that run has settled.

The same identity resumes; another one is an error that lists what differs.
"""

import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

from launch.config.frozen import (
    EXPORTED_CHECKPOINT_KEY,
    GROUPS_WITHOUT_EFFECT_ON_RESULT,
    ComposedConfig,
    DifferingSetting,
    differing_settings,
    is_finished,
    load_frozen_config,
)
from launch.config.learning_rate import keep_learning_rate_of_run
from launch.config.trusted_values import was_value_allowed_before
from launch.config.user_files import user_files_may_apply
from strategies.errors import ConfigError
from strategies.matmul import Matmul
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.config.run import (
    AUTO,
    MATMUL_KEY,
    MICRO_BATCH_KEY,
    STRATEGY_KEY,
    TEMPLATE_DATE_KEY,
    RunConfig,
    settled_matmul,
)
from trainer.data.config import ControlTokens
from trainer.data.tokens.clock import TemplateDate
from trainer.evaluation.interval import EVERY_STEPS
from trainer.export.config import ExportedCheckpoint
from trainer.reporting import settings_file
from trainer.reporting.resolution import ResolvedSetting
from trainer.reporting.status import CONFIG_SHA256_REGEX

MAX_SHOWN_DIFFERENCES = 12
"""Settings that an error lists before it only counts the others."""
RECORDED_OVERRIDES_REGEX = re.compile(r"^# overrides: (.*)$", re.MULTILINE)
"""The comment in the head of a `config.yaml` with the overrides that the run was composed from."""


def settle_resumed_config(
    composed: ComposedConfig, path: Path, *, has_progress: bool, may_change_strategy: bool
) -> None:
    """Compare a command with the run that its directory holds: the run resumes, or is replaced, or the command is refused.

    Called when a run is started, before its `config.yaml` is written.
    `path`: the `config.yaml` of the run in the directory.
    `has_progress`: the directory has a checkpoint or is finished.
    `may_change_strategy`: whether the run may resume with other operational settings, such as another strategy.
    The cases:

    - No setting that decides the result differs, or only by changed defaults of shardtune: the run resumes.
    - The directory has no progress: another command may take its place.
    - Only operational settings differ (strategy, micro-batch, `checkpoint.*` and others of `OPERATIONAL_KEYS`), with
      `may_change_strategy`: the run resumes with those of the command, and a line says so.
    - Otherwise: ConfigError, which names the settings.

    Sets in `composed.config` what the run has settled itself, if it resumes: learning rate, micro-batch, strategy, date of the
    chat template and others. A `config.yaml` that cannot be read raises ConfigError if there is progress.
    """
    config = composed.config
    earlier_config = _load_unless_replaceable(path, has_progress=has_progress)
    if earlier_config is None:
        return
    if has_progress:
        has_kept_interval = _keep_earlier_defaults(composed, earlier_config)
        if has_kept_interval:
            interval = DifferingSetting(EVERY_STEPS, value_in_run_dir=0, value_in_command=AUTO)
            print(f"{path.parent}: keeps the defaults that it began with: {interval}", file=sys.stderr)
    differing = differing_settings(config, earlier_config)
    if differing and has_progress and _only_defaults_changed(composed, differing, earlier_config, path):
        _copy_identifying_settings(config, earlier_config)
        print(f"{path.parent}: keeps the defaults that it began with: {_join_differences(differing)}", file=sys.stderr)
        differing = []

    is_same_run = not differing
    if is_same_run or may_change_strategy:
        # Also before a first checkpoint: data may have been prepared already, for the date that the run has recorded.
        _keep_matmul_library(config, earlier_config)
        _keep_template_date(config, earlier_config, path.parent, has_progress=has_progress)
    if is_same_run:
        _keep_chosen_strategy_and_micro_batch(config, earlier_config)
        if has_progress:
            _keep_control_tokens(config, earlier_config)
    elif has_progress and may_change_strategy and all(setting.is_operational for setting in differing):
        print(f"{path.parent}: resumes in another way: {_join_differences(differing)}", file=sys.stderr)
    elif has_progress:
        raise ConfigError(_different_run_message(path.parent, differing))


def _load_unless_replaceable(path: Path, *, has_progress: bool) -> RunConfig | None:
    """Read the configuration of the run that a directory holds already; None if it is broken and nothing would be lost.

    `path`: its `config.yaml`.
    `has_progress`: the directory has a checkpoint or is finished; then a file that cannot be read raises ConfigError.
    """
    try:
        return load_frozen_config(path)
    except ConfigError as error:
        if not has_progress:
            return None
        # The hash is written last, so a file without it was not written to its end.
        if CONFIG_SHA256_REGEX.search(path.read_text(encoding="utf-8", errors="replace")) is None:
            raise ConfigError(
                f"{path}: is torn, as by a power cut; delete it, and the same command writes it again and continues"
            ) from error
        raise


def _keep_earlier_defaults(composed: ComposedConfig, earlier_config: RunConfig) -> bool:
    """Give a resumed run the defaults that it began with, where shardtune's have changed since, so that it trains on as before.

    These are the learning rate, the exported checkpoint and the evaluation interval; they are set in `composed.config`, unless
    the user has set them.
    `earlier_config`: the configuration of the run.
    Returns whether the evaluation interval was set, about which the caller prints a line.
    """
    keep_learning_rate_of_run(composed.config, earlier_config)
    _keep_exported_checkpoint(composed, earlier_config)
    return _keep_evaluation_interval(composed, earlier_config)


def _join_differences(differing: list[DifferingSetting]) -> str:
    """All differing settings in one line, for messages."""
    return "; ".join(_difference_texts(differing))


def _difference_texts(differing: list[DifferingSetting]) -> list[str]:
    """Write each difference, without the settings that only one of two strategies has: `strategy.name` says why they differ."""
    has_other_strategy = any(difference.key == "strategy.name" for difference in differing)
    texts = []
    for difference in differing:
        is_of_one_strategy = difference.key.startswith("strategy.") and difference.is_missing_on_one_side
        if not (has_other_strategy and is_of_one_strategy):
            texts.append(str(difference))
    return texts


def _different_run_message(run_dir: Path, differing: list[DifferingSetting]) -> str:
    """Write the error message for a command whose directory holds another run: what differs, and what to do about it.

    `differing`: the settings that decide the result and differ; at most 12 are listed.
    One problem of several lines.
    """
    first_line = (
        f"run.dir={run_dir}: already holds a run with different settings; use another run.dir (to start from its "
        f"state: run.resume={run_dir}/checkpoints/<step>), or change these back:"
    )
    texts = _difference_texts(differing)
    lines = [first_line, *texts[:MAX_SHOWN_DIFFERENCES]]
    if len(texts) > MAX_SHOWN_DIFFERENCES:
        lines.append(f"and {len(texts) - MAX_SHOWN_DIFFERENCES} more")
    return "\n    ".join(lines)


def _keep_chosen_strategy_and_micro_batch(config: RunConfig, earlier_config: RunConfig) -> None:
    """Give a resumed run the micro-batch and the strategy that it chose itself for `auto`, since they are chosen once.

    `substitutions` of a configuration: a note on each setting that the run chose itself, by key. Without a note the user set it,
    and nothing is copied.
    """
    if MICRO_BATCH_KEY in earlier_config.substitutions:
        config.batch["micro"] = earlier_config.batch["micro"]
        config.substitutions[MICRO_BATCH_KEY] = earlier_config.substitutions[MICRO_BATCH_KEY]
    if STRATEGY_KEY in earlier_config.substitutions:
        config.strategy = earlier_config.strategy
        config.substitutions[STRATEGY_KEY] = earlier_config.substitutions[STRATEGY_KEY]


def keep_earlier_defaults(composed: ComposedConfig, run_dir: Path) -> None:
    """Give `composed.config` the defaults that the run in `run_dir` began with, if shardtune's defaults have changed since.

    For ranks that compose the run themselves, under torchrun: rank 0 does the same (`settle_resumed_config`) when it writes the
    run's `config.yaml`, and all ranks must train the same. Does nothing for a run without progress (a checkpoint, or a finished
    run). If settings differ for other reasons than defaults, they stay, and rank 0 refuses the command. Raises ConfigError if the
    `config.yaml` cannot be read.
    """
    path = run_dir / "config.yaml"
    has_checkpoint = bool(checkpoints_in(checkpoint_dirs_of(run_dir, composed.config.checkpoint.fallback_dir)))
    if not path.exists() or not (has_checkpoint or is_finished(run_dir)):
        return
    earlier_config = load_frozen_config(path)
    # First, since another learning rate or evaluation interval would count as a difference below.
    _keep_earlier_defaults(composed, earlier_config)
    differing = differing_settings(composed.config, earlier_config)
    if differing and _only_defaults_changed(composed, differing, earlier_config, path):
        _copy_identifying_settings(composed.config, earlier_config)
    if not differing:
        _keep_control_tokens(composed.config, earlier_config)


def keep_learning_rate_of_checkpoint(config: RunConfig) -> None:
    """Give a run that starts from another run's checkpoint (`run.resume=<directory>`) the learning rate of that run.

    Does nothing if the user of either run has set the rate, or if `run.resume` names no checkpoint.
    """
    if config.run.resume in ("auto", "never"):
        return
    checkpoint = Path(config.run.resume).expanduser().absolute()
    # The run is two levels above <run>/checkpoints/step-000005, or three above <run>/checkpoints/given-up-1/step-000005.
    for run_dir in list(checkpoint.parents)[1:3]:
        config_file = run_dir / "config.yaml"
        if config_file.is_file():
            with suppress(ConfigError):  # what is wrong with the file is said when the checkpoint is read
                keep_learning_rate_of_run(config, load_frozen_config(config_file))
            return


def _only_defaults_changed(
    composed: ComposedConfig, differing: list[DifferingSetting], earlier_config: RunConfig, path: Path
) -> bool:
    """Whether settings differ only because shardtune changed a default since the run began, so that the run may keep its own.

    `composed`: the command.
    `differing`: the settings that decide the result and differ.
    `earlier_config`: the run's configuration, and `path`: its `config.yaml`. True if the run began with the same overrides, and
    nothing else decides the settings that differ. False therefore if:

    - the overrides differ;
    - they use a variable of the environment (`${oc.env:NAME}`) or a settings file, whose content may have changed;
    - `earlier_config` names a file, address or code outside of the run that this user never typed;
    - this machine chose one of the settings that differ.
    """
    overrides = _identifying_overrides(composed.overrides)
    if not has_same_overrides(composed.overrides, path):
        return False
    has_interpolation = any("${" in override for override in overrides)
    if has_interpolation or user_files_may_apply(overrides):
        return False
    if _would_copy_untrusted_value(earlier_config, composed.config):
        return False
    keys_chosen_by_machine = {*composed.config.substitutions, *earlier_config.substitutions}
    return not any(difference.key in keys_chosen_by_machine for difference in differing)


def _would_copy_untrusted_value(earlier_config: RunConfig, config: RunConfig) -> bool:
    """Whether copying `earlier_config` to `config` would let this process read a file, reach an address or run code unasked.

    Somebody else may have written the run directory. A setting with such an effect is trusted if the command sets it too, or if
    this user allowed it before. The overrides in the head of a `config.yaml` are no proof, because whoever wrote the directory
    wrote them as well.
    """
    from launch.config.outside_values import values_needing_consent

    values_of_command = values_needing_consent(config)
    for value in values_needing_consent(earlier_config):
        # Groups without effect on the result, such as `logging`, are not copied.
        is_copied = any(key.partition(".")[0] not in GROUPS_WITHOUT_EFFECT_ON_RESULT for key in value.settings)
        if is_copied and value not in values_of_command and not was_value_allowed_before(value.identity):
            return True
    return False


def has_same_overrides(overrides: list[str], path: Path) -> bool:
    """Whether the `config.yaml` at `path` was composed from the same overrides, apart from those that decide no result."""
    return _identifying_overrides(overrides) == _identifying_overrides(_recorded_overrides(path))


def _copy_identifying_settings(config: RunConfig, earlier_config: RunConfig) -> None:
    """Copy all settings that decide a run's result from the run that is resumed (`earlier_config`) to `config`.

    Also copies the notes (`substitutions`) on the micro-batch and strategy that the run chose itself. `run.*` except for the
    seed, and which checkpoint is exported, stay as they are in `config`, since they decide no result.
    """
    exported_checkpoint = config.export.checkpoint
    for group in fields(RunConfig):
        if group.name not in (*GROUPS_WITHOUT_EFFECT_ON_RESULT, "run"):
            setattr(config, group.name, getattr(earlier_config, group.name))
    config.export = replace(earlier_config.export, checkpoint=exported_checkpoint)
    config.run.seed = earlier_config.run.seed
    for key in (MICRO_BATCH_KEY, STRATEGY_KEY):
        if key in earlier_config.substitutions:
            config.substitutions[key] = earlier_config.substitutions[key]


def _identifying_overrides(overrides: list[str]) -> set[str]:
    """The overrides that decide a run's result, such as {"optim.lr=1e-4"}: two commands with the same ones are of the same run.

    Left out: groups of `GROUPS_WITHOUT_EFFECT_ON_RESULT`, `export.checkpoint`, and `run.*` except for `run.seed`.
    """
    identifying = set()
    for override in overrides:
        key = _key_of_override(override)
        group = key.partition(".")[0]
        is_identifying = group not in (*GROUPS_WITHOUT_EFFECT_ON_RESULT, "run") and key != EXPORTED_CHECKPOINT_KEY
        if is_identifying or key == "run.seed":
            identifying.add(override)
    return identifying


def _key_of_override(override: str) -> str:
    """The setting or group that an override of the command line names."""
    return override.lstrip("+~").partition("=")[0]


def _recorded_overrides(path: Path) -> list[str]:
    """The overrides that a run was started with, from the comment in the head of its `config.yaml`; empty if it has none.

    The head has them as JSON strings with blanks between them: `# overrides: "optim.lr=1e-4" "data.path=my data"`.
    """
    match = RECORDED_OVERRIDES_REGEX.search(settings_file.read_settings_text(path))
    if match is None:
        return []
    decoder = json.JSONDecoder()
    json_overrides = match[1]
    overrides = []
    start = 0
    # The JSON reader finds the end of each string, which a split at blanks would not.
    while start < len(json_overrides):
        override, end = decoder.raw_decode(json_overrides, start)
        overrides.append(str(override))
        start = end + 1
    return overrides


def _keep_template_date(config: RunConfig, earlier_config: RunConfig, run_dir: Path, *, has_progress: bool) -> None:
    """Give a resumed run the date that its chat template wrote as "today" at the first start; prepared data depends on it.

    The run recorded it as a note in `substitutions`. A run of an earlier version has not; if it has progress, the day of its
    oldest file is taken. That date is left out of the fingerprint of its data (`in_fingerprint`), which had no date in that
    version. Does nothing if no date is recorded and there is no progress.
    """
    if TEMPLATE_DATE_KEY in earlier_config.substitutions:
        config.substitutions[TEMPLATE_DATE_KEY] = earlier_config.substitutions[TEMPLATE_DATE_KEY]
    elif has_progress:
        oldest_s = time.time()  # seconds since 1970
        for file in run_dir.rglob("*"):
            with suppress(OSError):  # removed meanwhile
                oldest_s = min(oldest_s, file.stat().st_mtime)
        template_date = TemplateDate(date.fromtimestamp(oldest_s), in_fingerprint=False)
        config.substitutions[TEMPLATE_DATE_KEY] = str(template_date)


def _keep_matmul_library(config: RunConfig, earlier_config: RunConfig) -> None:
    """Record in `config` the library of float32 matrix products that the run began with, unless the command names one.

    Another library may round otherwise, and so change the loss of a resumed run. The note goes to `substitutions`, by which a
    start knows what was chosen for `auto`.
    """
    library = settled_matmul(earlier_config)
    if config.run.matmul is not Matmul.auto or library is Matmul.auto:
        return
    recorded_note = earlier_config.resolution(MATMUL_KEY)
    config.substitutions[MATMUL_KEY] = recorded_note or ResolvedSetting(
        setting=MATMUL_KEY, asked=AUTO, chosen=str(library), reason="as this run began"
    )


def _keep_control_tokens(config: RunConfig, earlier_config: RunConfig) -> None:
    """Give a resumed run the way in which control tokens in texts were read when it began, if `config` leaves it at `auto`.

    Prepared data depends on it, and `auto` may mean something else in this version.
    """
    if config.data.control_tokens is ControlTokens.auto:
        config.data.control_tokens = earlier_config.data.control_tokens


def _keep_exported_checkpoint(composed: ComposedConfig, earlier_config: RunConfig) -> None:
    """Give `composed.config` the choice of the exported checkpoint that the run began with, unless the user has set it.

    So a run of a version without the setting still exports its last checkpoint.
    """
    is_left_open = composed.config.export.checkpoint is ExportedCheckpoint.auto
    if is_left_open and not _is_set_by_user(EXPORTED_CHECKPOINT_KEY, composed):
        composed.config.export.checkpoint = earlier_config.export.checkpoint


def _keep_evaluation_interval(composed: ComposedConfig, earlier_config: RunConfig) -> bool:
    """Set `evaluation.every_steps` to 0 if the resumed run began with 0 and the command leaves it at `auto`.

    0 (evaluated only at the start and the end) was the default of earlier versions. Not done if the user has set `auto`
    explicitly. Returns whether it was set.
    """
    evaluation = composed.config.evaluation
    default_has_changed = evaluation.every_steps == AUTO and earlier_config.evaluation.every_steps == 0
    if not default_has_changed or _is_set_by_user(EVERY_STEPS, composed):
        return False
    evaluation.every_steps = 0
    return True


def _is_set_by_user(key: str, composed: ComposedConfig) -> bool:
    """Whether the overrides of the command set this setting."""
    return any(_key_of_override(override) == key for override in composed.overrides)
