"""What of a run may change when it is resumed: the kinds of change, and a configuration as keys and values to compare.

The field of a setting says its kind (`resume`), or that of its group does: `trainer.config.tree.change_kind_of_setting`.

A run that goes on with other data, another base or another order is another run; it is refused with the difference, unless
`run.accept` names the kind. Where and how fast the same is computed may change: strategy, ranks, batch.micro.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from enum import Enum
from typing import Any

KINDS_OF_CHANGE = {
    "data": "what was prepared: rows, tokenizer, template, how they are read",
    "base": "files of the base model, of a teacher and of adapters, and what is done to them",
    "tuning": "what is trained: the method and its settings",
    "objective": "the loss and its settings",
    "rewards": "the files of reward functions that score written answers",
    "order": "seed, global batch, packing and mixing: which documents a step sees",
    "optimizer": "optimizer, schedule, and what is done about outliers",
    "precision": "in which precision is computed",
    "code": "shardtune's own source",
    "versions": "Python, torch and the other libraries that compute",
    "unknown": "a checkpoint that lies in no run's directory, of which none of these is known",
}
"""The kinds of change that `run.accept` may name, each with what changes."""


def settings_as_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, such as {"optim": {"lr": 1e-4}}, to be compared or written."""
    tree: dict[str, Any] = _as_json_value(asdict(config))
    return tree


def _as_json_value(value: Any) -> Any:
    """A value with enums as their names, and tuples as lists."""
    if isinstance(value, dict):
        return {key: _as_json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json_value(entry) for entry in value]
    return value.name if isinstance(value, Enum) else value


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to compare it key by key: {"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}.

    An empty dictionary stays a value.
    """
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten_settings(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def default_settings(config: Any) -> dict[str, Any]:
    """What each setting of a configuration would be if it were not set, by dotted key, such as {"optim.beta1": 0.9}.

    Settings without a default are left out. A group that several classes can fill (`tuning`, `optim`, `schedule` ...) has the
    defaults of the class that `config` holds.
    """
    defaults: dict[str, Any] = {}
    _add_defaults(config, MISSING, "", defaults)
    return defaults


def _add_defaults(value: Any, default: Any, key: str, defaults: dict[str, Any]) -> None:
    """Do the work of `default_settings` for one value of the configuration, which stands at `key`, and for all that is inside.

    For `config.optim` at "optim" it adds {"optim.lr": None, "optim.weight_decay": 0.01, ...}. `default`: of `value` itself, as
    the field that holds it declares; MISSING if it has none, and then nothing is added for a plain value.
    """
    if is_dataclass(value):
        for setting in fields(value):
            # What the field of a group declares (optim=AdamwConfig(lr=1e-5)) counts before the defaults of the group's class.
            if type(default) is type(value):
                own_default = getattr(default, setting.name)
            else:
                own_default = _default_of_field(setting)
            own_key = f"{key}.{setting.name}" if key else setting.name
            _add_defaults(getattr(value, setting.name), own_default, own_key, defaults)
    elif isinstance(value, dict) and value:
        # A table whose names the user chose, such as `evaluation.tasks`: no entry has a default, the fields of an entry do.
        for name, entry in value.items():
            _add_defaults(entry, MISSING, f"{key}.{name}", defaults)
    elif default is not MISSING:
        defaults[key] = _as_json_value(default)


def _default_of_field(setting: Field[Any]) -> Any:
    """The default of a field; MISSING if it has none."""
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return setting.default
