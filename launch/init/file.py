"""Builds the text of a settings file: the settings that are set and, commented out, those that people change most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, get_type_hints

from launch.config.choices import (
    CONF_DIR,
    choices_by_group,
    register_schemas,
    settings_class_of,
    settings_classes_by_group,
)
from launch.config.compose import hydra_arguments
from launch.config.user_files import GROUPS_CHOSEN_BY_NAME
from trainer.config.descriptions import direct_field_docstrings, field_docstrings
from trainer.config.run import RunConfig

if TYPE_CHECKING:
    from launch.config.parsed_overrides import ParsedOverrides

COMMENT_WIDTH_COLUMNS = 100
"""Columns of the comments in the file."""
_SHOWN_KEYS_TEXT = """
run.dir run.seed model.path model.tokenizer model.attention model.quantisation data.path data.eval_path data.eval_share
data.format data.max_length data.packing data.over_length batch.global batch.micro budget.steps budget.epochs budget.tokens
precision tuning.targets tuning.rank tuning.alpha tuning.dropout tuning.modules_to_save objective.beta
strategy.activation_checkpointing strategy.compile strategy.offload_optimizer strategy.cpu_offload optim.lr
optim.weight_decay optim.max_grad_norm optim.betas schedule.warmup_steps schedule.warmup_share schedule.min_factor
evaluation.every_steps evaluation.patience checkpoint.every_steps checkpoint.every_minutes checkpoint.keep export.merge
logging.every_steps logging.wandb logging.project launcher.processes launcher.nodes launcher.partition launcher.account
launcher.time launcher.gpus_per_node
"""
SHOWN_KEYS = frozenset(_SHOWN_KEYS_TEXT.split())
"""Settings that the file shows as comments if they are not set, unless the choices of the file do not have them."""


def default_run_config(choices: Mapping[str, str]) -> RunConfig:
    """Compose every setting with its default under these choices (`{"tuning": "lora"}`), `auto` not resolved yet."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        defaults: Any = OmegaConf.to_object(compose("train", hydra_arguments(dict(choices))))
    assert isinstance(defaults, RunConfig)
    return defaults


@dataclass(frozen=True, slots=True)
class SettingsFileContext:
    """What every part of a settings file is written from: the user's choices, and the defaults under them."""

    choices: Mapping[str, str]
    """The choices of the user, by group, such as {"tuning": "lora"}."""
    defaults: RunConfig
    """Every setting under these choices, with its default."""
    foreign_text_by_key: Mapping[str, str]
    """What each setting was in another trainer's file, by our key: {"optim.lr": "learning_rate: 2e-5"}."""


def settings_file_text(
    head: list[str], parsed: ParsedOverrides, foreign_text_by_key: Mapping[str, str], tail: list[str]
) -> str:
    """Write the text of a settings file (YAML): a block for each group of settings, with comments that explain them.

    `head`, `tail`: lines of comments.
    `parsed`: the settings, which must compose.
    `foreign_text_by_key`: what a setting was in another trainer's file, by our key.
    """
    context = SettingsFileContext(parsed.choices, default_run_config(parsed.choices), foreign_text_by_key)
    set_values = nested_setting_values(parsed)
    lines = [*head, ""]
    # Without the groups in GROUPS_CHOSEN_BY_NAME, whose choice stands in their block, as `name`.
    listed_choices = {group: choice for group, choice in parsed.choices.items() if group not in GROUPS_CHOSEN_BY_NAME}
    if listed_choices:
        lines += ["defaults:", *(f"  - {group}: {choice}" for group, choice in listed_choices.items()), ""]
    docstring_by_group = direct_field_docstrings(RunConfig)
    # A field of RunConfig is a group of settings with a class, the dictionary `batch`, or a single setting such as `precision`.
    for name, annotation in get_type_hints(RunConfig).items():
        if name == "substitutions":  # what a run resolved itself: no setting
            continue
        if is_dataclass(annotation) or name in settings_classes_by_group():
            assert isinstance(annotation, type)
            block = _lines_of_group(name, annotation, set_values.get(name, {}), context)
        elif name == "batch":
            block = [
                *_comment_lines(docstring_by_group[name], ""),
                "batch:",
                *_lines_of_batch(set_values.get("batch", {}), context),
            ]
        else:
            default = getattr(context.defaults, name)
            block = [
                *_comment_lines(docstring_by_group[name], ""),
                *_lines_of_setting(name, name, set_values, default, "", context),
            ]
        if block:
            lines += [*block, ""]
    return "\n".join([*lines, *tail]).rstrip() + "\n"


def nested_setting_values(parsed: ParsedOverrides) -> dict[str, Any]:
    """The values of all overrides as nested dictionaries, as YAML has them: `optim.lr=1e-4` becomes `{"optim": {"lr": 1e-4}}`."""
    tree: dict[str, Any] = {}
    for key, value, *_ in parsed.values:
        *parents, leaf = key.split(".")
        block = tree
        for parent in parents:
            block = block.setdefault(parent, {})
        leaf = leaf.removesuffix("_")  # fields whose name is a Python keyword end with _
        # A dictionary adds to what single keys have set in it.
        if isinstance(value, dict) and isinstance(block.get(leaf), dict):
            block[leaf].update(value)
        else:
            block[leaf] = value
    return tree


def one_line_yaml(value: Any) -> str:
    """A value in YAML on one line: `[q_proj, v_proj]`, `2.0e-05`, `null`."""
    import yaml

    document = yaml.safe_dump(
        _without_enums(value), default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
    )
    # YAML ends a document that is one bare value with `...`.
    return document.removesuffix("\n").removesuffix("\n...")


def _without_enums(value: Any) -> Any:
    """The value with the values of enums in their place: YAML cannot write enums."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _without_enums(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_enums(entry) for entry in value]
    return value


def _lines_of_group(name: str, annotation: type, set_values: dict[str, Any], context: SettingsFileContext) -> list[str]:
    """Write the lines of one group of settings, such as `optim`; empty if nothing in it is set or shown.

    Shown are settings that people change most, as comments (`SHOWN_KEYS`). `annotation`: the group's class. `set_values`: those
    of its values that are set. For example: ["# <docstring of the class>", "budget:", "  # <docstring of the setting>", "  steps:
    100"]
    """
    group_defaults = getattr(context.defaults, name)
    settings_class = annotation
    lines: list[str] = []
    # The choice of a group such as `optim` is written as its `name`, and decides which class its settings have.
    if name in GROUPS_CHOSEN_BY_NAME:
        chosen = context.choices.get(name)
        choice = chosen or str(one_line_yaml(group_defaults.name))
        if name in settings_classes_by_group():
            settings_class = settings_class_of(name, choice)
        choices = ", ".join(choices_by_group()[name])
        lines += _comment_lines(f"One of {choices}; docs/config.md lists the settings of each.", "  ")
        if chosen:
            lines.append(f"  name: {choice}{_origin_comment(name, context)}")
        else:
            lines.append(f"  # name: {choice}")
    lines += _lines_of_block(name, settings_class, group_defaults, set_values, context, depth=1)
    if not lines:
        return []
    heading = []
    if settings_class.__doc__:
        first_paragraph = settings_class.__doc__.strip().split("\n\n")[0]
        heading = _comment_lines(first_paragraph, "")
    if not lines[0]:  # an empty line stands between settings, not before the first one
        lines = lines[1:]
    return [*heading, f"{name}:", *lines]


def _lines_of_block(
    prefix: str,
    settings_class: type,
    defaults: Any,
    set_values: dict[str, Any],
    context: SettingsFileContext,
    *,
    depth: int,
) -> list[str]:
    """Write the lines of the settings of a class that are set or shown; an inner class is there if something in it is set.

    `prefix`: the dotted key of the block, such as `optim`.
    `defaults`: its object with defaults.
    `set_values`: what is set in it.
    `depth`: its level, 1 for a group.

    An empty line stands before each setting, the first one too.
    """
    lines: list[str] = []
    docstring_by_field = field_docstrings(settings_class)
    type_by_field = get_type_hints(settings_class)
    indent = "  " * depth
    for setting in fields(settings_class):
        name = setting.name.removesuffix("_")  # a field whose name is a Python keyword ends with _
        key = f"{prefix}.{name}"
        is_choice = depth == 1 and name == "name" and prefix in GROUPS_CHOSEN_BY_NAME
        # Left out: the group's `name`, which `_lines_of_group` writes, and what is neither set nor always shown.
        if is_choice or (name not in set_values and key not in SHOWN_KEYS):
            continue
        default = getattr(defaults, setting.name)
        comment = _comment_lines(docstring_by_field[setting.name], indent)
        setting_type = type_by_field[setting.name]
        if is_dataclass(setting_type):  # such as `evaluation.generate`; none of these is in SHOWN_KEYS
            assert isinstance(setting_type, type)
            inner_lines = _lines_of_block(key, setting_type, default, set_values[name], context, depth=depth + 1)
            if inner_lines:
                lines += ["", *comment, f"{indent}{name}:", *inner_lines[1:]]
        else:
            lines += ["", *comment]
            lines += _lines_of_setting(key, name, set_values, default, indent, context)
    return lines


def _lines_of_batch(set_values: dict[str, Any], context: SettingsFileContext) -> list[str]:
    """The lines of the group `batch`, which is a dictionary and no class: both of its settings, set or commented out."""
    lines = []
    for name in ("global", "micro"):
        lines += _lines_of_setting(f"batch.{name}", name, set_values, context.defaults.batch[name], "  ", context)
    return lines


def _lines_of_setting(
    key: str, name: str, set_values: Mapping[str, Any], default: Any, indent: str, context: SettingsFileContext
) -> list[str]:
    """Write the lines of one setting: its value if it is set, otherwise its default as a comment.

    A dictionary has a line for its name and one for each entry. `key`: the full key. `name`: the name in `set_values`.
    """
    if name not in set_values:
        return [f"{indent}# {name}: {one_line_yaml(default)}"]
    value = set_values[name]
    if not isinstance(value, dict) or not value:
        return [f"{indent}{one_line_yaml(name)}: {one_line_yaml(value)}{_origin_comment(key, context)}"]
    lines = [f"{indent}{one_line_yaml(name)}:{_origin_comment(key, context)}"]
    for entry_name in value:
        lines += _lines_of_setting(f"{key}.{entry_name}", entry_name, value, None, f"{indent}  ", context)
    return lines


def _origin_comment(key: str, context: SettingsFileContext) -> str:
    """A comment on what a setting was in another trainer's file: `  # learning_rate: 2e-5`; empty if it comes from elsewhere."""
    if key not in context.foreign_text_by_key:
        return ""
    one_line = " ".join(context.foreign_text_by_key[key].split())
    return f"  # {one_line}"


def comment_lines_of_sentences(sentences: list[str]) -> list[str]:
    """Sentences as lines of comments; an empty sentence is an empty comment."""
    lines = []
    for sentence in sentences:
        lines += _comment_lines(sentence, "") if sentence else ["#"]
    return lines


def _comment_lines(sentence: str, indent: str) -> list[str]:
    """Wrap a sentence into comment lines, each after `indent`; names and paths are never broken."""
    line_start = f"{indent}# "
    return textwrap.wrap(
        " ".join(sentence.split()),
        COMMENT_WIDTH_COLUMNS,
        initial_indent=line_start,
        subsequent_indent=line_start,
        break_on_hyphens=False,
        break_long_words=False,
    )
