"""The name, the flat columns and the whole configuration of a run for a tracker's table of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.resuming import flat, plain
from trainer.config.run import RunConfig
from trainer.reporting.config import COLUMNS
from trainer.reporting.numbers import short
from trainer.reporting.run_record import RunRecord

FACTS = ("world_size", "accumulation", "total_steps", "attention", "layout", "device_name")
"""Fields of `run.json` on how steps are computed that become columns."""
PATHS = ("model.path", "data.path")


def name_of(config: RunConfig) -> str:
    """The run's name in trackers, such as fsdp2-lora-lr2e-4."""
    return f"{config.strategy.name}-{config.tuning.name}-lr{short(config.optim.lr)}"


def tracker_settings(config: RunConfig, record: RunRecord) -> dict[str, Any]:
    """Flat columns of a run, and the whole configuration under `config`."""
    tree = plain(config)
    leaves = flat(tree)
    columns: dict[str, Any] = {name: _column_content(key, leaves.get(key)) for key, name in COLUMNS.items()}
    for key in FACTS:
        columns[key] = getattr(record, key)
    columns["base_model"] = record.base_model
    columns["run_dir"] = config.run.dir
    columns["precision"] = record.precision
    columns |= chosen_columns(config.logging.columns, leaves)
    columns["data_fingerprint"] = record.data_fingerprint
    columns["git_revision"] = record.git_revision
    columns["versions"] = record.versions
    columns["substitutions"] = record.substitutions
    columns["config"] = tree
    return columns


def chosen_columns(words: list[str], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that `logging.columns` asks for: `optim.weight_decay` becomes the column `optim_weight_decay`.

    A group (`optim`) gives the name of its choice. `name=text` makes a column of that name and content.
    """
    columns: dict[str, Any] = {}
    for word in words:
        key, is_own_column, text = word.partition("=")
        if is_own_column:
            columns[re.sub(r"\W", "_", key)] = text
            continue
        setting = key if key in leaves else f"{key}.name"
        if setting in leaves and setting not in COLUMNS:
            columns[re.sub(r"\W", "_", key.strip("_"))] = _column_content(setting, leaves[setting])
    return columns


def _column_content(key: str, setting_value: Any) -> Any:
    """A value as a column shows it: numbers as they are, paths by their last part, lists as one text."""
    if key in PATHS and setting_value is not None:
        paths = setting_value if isinstance(setting_value, list) else [setting_value]
        return "+".join(Path(str(path)).name or str(path) for path in paths)[:80]
    if isinstance(setting_value, list):
        return ",".join(map(str, setting_value))
    return setting_value
