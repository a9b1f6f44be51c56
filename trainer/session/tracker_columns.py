"""The name, the flat columns and the whole configuration of a run for a tracker's table of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.resuming import flatten_settings, settings_as_dict
from trainer.config.run import RunConfig
from trainer.reporting.config import WANDB_COLUMN_BY_SETTING
from trainer.reporting.numbers import format_setting
from trainer.reporting.run_record import RunRecord

RECORD_FIELDS = (
    "world_size",
    "hosts",
    "accumulation",
    "total_steps",
    "attention",
    "layout",
    "device_name",
    "metric_names",
)
"""Fields of `run.json` on how steps are computed, and under which names they are logged, that become columns."""
PATH_SETTINGS = ("model.path", "data.path")
MAX_PATH_CHARACTERS = 80
"""Characters of a column that names paths."""


def name_of(config: RunConfig) -> str:
    """The run's name in trackers, such as fsdp2-lora-lr2e-4."""
    return f"{config.strategy.name}-{config.tuning.name}-lr{format_setting(config.optim.lr)}"


def tracker_settings(config: RunConfig, record: RunRecord) -> dict[str, Any]:
    """Collect a run's columns for a tracker's table of runs, and the whole configuration as nested settings under `config`.

    In the order in which they are set here, which trackers may keep. The columns that `logging.columns` names replace those that
    are set before them, but no fact that tells runs apart.
    """
    nested_settings = settings_as_dict(config)
    settings = flatten_settings(nested_settings)  # by dotted key
    columns: dict[str, Any] = {}
    for key, name in WANDB_COLUMN_BY_SETTING.items():
        columns[name] = _column_value(key, settings.get(key))
    for field_name in RECORD_FIELDS:
        columns[field_name] = getattr(record, field_name)
    columns["parameters"] = record.sharding.parameters
    columns["trainable"] = record.sharding.trainable_parameters
    columns["rank"] = settings.get("tuning.rank")  # of an adapter
    columns["base_model"] = record.base_model
    columns["run_dir"] = config.run.dir
    columns["precision"] = record.precision
    columns |= chosen_columns(config.logging.columns, settings)
    columns["data_fingerprint"] = record.data_fingerprint
    columns["git_revision"] = record.git_revision
    columns["versions"] = record.versions
    columns["substitutions"] = record.substitutions
    columns["config"] = nested_settings
    return columns


def chosen_columns(column_specs: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the columns that the user lists in `logging.columns`, by column name. Each entry of the list is one of

    - a setting: `optim.weight_decay` becomes the column `optim_weight_decay` with the setting's value;
    - a group of settings: `optim` becomes the column `optim` with the name of the optimizer;
    - `name=text`: a column of that name and content.

    `settings`: those of the run, by dotted key. A setting that does not exist, or has a column anyway, is left out.
    """
    columns: dict[str, Any] = {}
    for column_spec in column_specs:
        key, equals_sign, text = column_spec.partition("=")
        if equals_sign:
            columns[re.sub(r"\W", "_", key)] = text
            continue
        # A group is shown by its `name`, such as `optim.name`.
        setting = key if key in settings else f"{key}.name"
        if setting in settings and setting not in WANDB_COLUMN_BY_SETTING:  # those are there anyway
            column_name = re.sub(r"\W", "_", key.strip("_"))
            columns[column_name] = _column_value(setting, settings[setting])
    return columns


def _column_value(key: str, setting_value: Any) -> Any:
    """The value of a setting as a column shows it.

    - Paths (a key of PATH_SETTINGS) by their last part: ["/a/base", "/b/more"] -> "base+more".
    - Other lists as one text: [1, 2] -> "1,2".
    - Anything else as it is.
    """
    if key in PATH_SETTINGS and setting_value is not None:
        paths = setting_value if isinstance(setting_value, list) else [setting_value]
        names = [Path(str(path)).name or str(path) for path in paths]
        return "+".join(names)[:MAX_PATH_CHARACTERS]
    if isinstance(setting_value, list):
        return ",".join(map(str, setting_value))
    return setting_value
