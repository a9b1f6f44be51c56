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
    """Flat columns, and under `config` the whole configuration."""
    tree = plain(config)
    leaves = flat(tree)
    columns = {name: _shown(key, leaves.get(key)) for key, name in COLUMNS.items()}
    columns |= {key: getattr(record, key) for key in FACTS}
    columns |= {"base_model": record.base_model, "run_dir": config.run.dir, "precision": record.precision}
    columns |= chosen_columns(config.logging.columns, leaves)
    more = {
        "data_fingerprint": record.data_fingerprint,
        "git_revision": record.git_revision,
        "versions": record.versions,
        "substitutions": record.substitutions,
    }
    return {**columns, **more, "config": tree}


def chosen_columns(words: list[str], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the settings that `logging.columns` names: `optim.weight_decay` stands as `optim_weight_decay`.

    A choice of a group (`optim`) is its name; `name=text` is a column of one's own.
    """
    columns: dict[str, Any] = {}
    for word in words:
        key, assigned, text = word.partition("=")
        full = key if key in leaves else f"{key}.name"
        if assigned:
            columns[re.sub(r"\W", "_", key)] = text
        elif full not in COLUMNS and full in leaves:
            columns[re.sub(r"\W", "_", key.strip("_"))] = _shown(full, leaves[full])
    return columns


def _shown(key: str, setting_value: Any) -> Any:
    """A value as a column shows it: numbers as they are, paths by their last part, lists as one text."""
    if key in PATHS and setting_value is not None:
        parts = setting_value if isinstance(setting_value, list) else [setting_value]
        return "+".join(Path(str(part)).name or str(part) for part in parts)[:80]
    return ",".join(map(str, setting_value)) if isinstance(setting_value, list) else setting_value
