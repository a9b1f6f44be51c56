"""Every setting that a run can have, by its full key, and the setting that a typed key means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

from launch.config.choices import settings_class_of, settings_classes_by_group, shipped_choices_by_group
from trainer.optim.schedule import SCHEDULES_BY_SETTING


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known about one setting of a run: its type, and under which choices it exists.

    A group such as `tuning` has named choices, and each may have settings of its own.
    """

    type: Any
    """The annotation of its field, such as `float | None`."""
    available_under: tuple[str, ...] = ()
    """The choices of its group under which it exists, ("lora", "vera", ...) for `tuning.rank`; empty: always."""


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting that a run can have, by full key; with it, typed keys are recognised and mistyped ones get a suggestion.

    {"optim.lr": Setting(float | None), "tuning.rank": Setting(int, ("lora", "vera", ...)), "data.sources.*.path": ...}. All
    choices of a group are included, whichever one a run makes; `*` stands for names that the user chooses. Computed once a
    process.
    """
    from trainer.config.run import RunConfig
    from trainer.config.tree import keyed_fields

    settings_by_key: dict[str, Setting] = {}
    groups_with_classes = settings_classes_by_group()  # groups whose choices have different settings, such as `tuning`
    for keyed_field in keyed_fields(RunConfig):
        group, _, key_in_group = keyed_field.key.partition(".")
        if group in groups_with_classes and not key_in_group:
            settings_by_key |= _settings_under_choices(group)
        # A key that `is_group` is a block of settings, and no setting itself.
        elif group not in groups_with_classes and not keyed_field.is_group:
            settings_by_key[keyed_field.key] = Setting(keyed_field.type)
    for key, setting in settings_by_key.items():
        # A setting that every choice of its group has needs none of them.
        all_choices = shipped_choices_by_group().get(key.split(".")[0], ())
        if set(setting.available_under) == set(all_choices):
            settings_by_key[key] = Setting(setting.type)
    # The schedules share one class, in which some settings mean something under some of them only.
    for name, schedules in SCHEDULES_BY_SETTING.items():
        key = f"schedule.{name}"
        choices = tuple(str(schedule) for schedule in schedules)
        settings_by_key[key] = Setting(settings_by_key[key].type, available_under=choices)
    del settings_by_key["substitutions"]  # what a run records about itself; nobody types it
    return settings_by_key


def _settings_under_choices(group: str) -> dict[str, Setting]:
    """The settings of a group whose choices have different settings, such as `tuning`, each with the choices that have it.

    {"tuning.rank": Setting(int, ("lora", "vera", ...)), ...}. A choice is a file of conf/; each has a dataclass of settings,
    which several may share: zero2 and zero3 have that of `zero`.
    """
    from trainer.config.tree import keyed_fields

    # In the order of the classes, and not of the alphabet, because messages list the choices in this order.
    ordered_choices = [*settings_classes_by_group()[group], *shipped_choices_by_group()[group]]
    settings_by_key: dict[str, Setting] = {}
    for choice in sorted(shipped_choices_by_group()[group], key=ordered_choices.index):
        for keyed_field in keyed_fields(settings_class_of(group, choice), group):
            if keyed_field.is_group:  # a block of settings, whose settings come by themselves
                continue
            key = keyed_field.key
            earlier_choices = settings_by_key[key].available_under if key in settings_by_key else ()
            settings_by_key[key] = Setting(keyed_field.type, available_under=(*earlier_choices, choice))
    return settings_by_key


def key_with_underscore(key: str) -> str:
    """The key of the dataclass field behind a typed key: `tuning.from` -> `tuning.from_`; nearly always the key itself.

    A field whose name would be a keyword of Python ends in an underscore; it is typed without.
    """
    if key not in all_settings() and f"{key}_" in all_settings():
        return f"{key}_"
    return key


def find_setting(key: str) -> Setting | None:
    """The setting that a key on the command line or in a file means, with its type; None if there is none.

    For example:

    - `optim.lr`: the setting of this key;
    - `data.sources.chat.path`: the setting `data.sources.*.path`, because the user chooses the name `chat`;
    - `data.columns.text`: an entry of the dictionary `data.columns`, with the type of its values.
    """
    settings_by_key = all_settings()
    key = key_with_underscore(key)
    names = key.split(".")
    # Any name but the first may be the user's own.
    wildcard_keys = [".".join([*names[:n], "*", *names[n + 1 :]]) for n in range(1, len(names))]
    for candidate in (key, *wildcard_keys):
        if candidate in settings_by_key:
            return settings_by_key[candidate]
        # The key without its last name may be a setting that is a dictionary, which this key is an entry of.
        table = settings_by_key.get(candidate.rpartition(".")[0])
        if table is not None and get_origin(table.type) is dict:
            entry_type = get_args(table.type)[1]
            # A setting of type `Any` holds text as typed (see `_is_text_type`), but in a table of anything numbers are numbers.
            if entry_type is Any:
                entry_type = object
            return Setting(entry_type, table.available_under)
    return None
