"""Builds the text of a settings file: the settings that are set and, commented out, those that people change most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, get_type_hints

from launch.config.choices import CONF_DIR, choices_by_group, register_schemas, settings_class_of, settings_classes
from launch.config.compose import hydra_arguments
from launch.config.user_files import CHOSEN_BY_NAME
from trainer.config.descriptions import all_docstrings, docstrings
from trainer.config.run import RunConfig

if TYPE_CHECKING:
    from launch.config.overrides import ParsedOverrides

WIDTH = 100
"""Columns of the comments in the file."""
OFTEN_CHANGED = """
run.dir run.seed model.path model.tokenizer model.attention model.quantisation data.path data.eval_path data.eval_share
data.format data.max_length data.packing data.over_length batch.global batch.micro budget.steps budget.epochs budget.tokens
precision tuning.targets tuning.rank tuning.alpha tuning.dropout tuning.modules_to_save objective.beta
strategy.activation_checkpointing strategy.compile strategy.offload_optimizer strategy.cpu_offload optim.lr
optim.weight_decay optim.max_grad_norm optim.betas schedule.warmup_steps schedule.warmup_share schedule.min_factor
evaluation.every_steps evaluation.patience checkpoint.every_steps checkpoint.every_minutes checkpoint.keep export.merge
logging.every_steps logging.wandb logging.project launcher.processes launcher.nodes launcher.partition launcher.account
launcher.time launcher.gpus_per_node
"""
SHOWN = frozenset(OFTEN_CHANGED.split())
"""Settings that the file shows as comments if they are not set, unless the choices of the file do not have them."""


def defaults_of(choices: Mapping[str, str]) -> RunConfig:
    """Every setting with its default under these choices (`{"tuning": "lora"}`), `auto` not resolved yet."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        defaults: Any = OmegaConf.to_object(compose("train", hydra_arguments(dict(choices))))
    assert isinstance(defaults, RunConfig)
    return defaults


@dataclass(frozen=True, slots=True)
class FileContent:
    """What every part of the settings file is written from."""

    choices: Mapping[str, str]
    """The choices that were typed, by group."""
    defaults: RunConfig
    """Every setting under these choices, with its default."""
    origin: Mapping[str, str]
    """What a setting was in another trainer's file, by our key."""


def settings_file_text(head: list[str], parsed: ParsedOverrides, origin: Mapping[str, str], tail: list[str]) -> str:
    """The text of a settings file (YAML): a block for each group of settings, with comments that explain them.

    `parsed`: the settings, which must compose. `origin` is what a setting was in another trainer's file, by our key. `head` and
    `tail` are lines of comments.
    """
    content = FileContent(parsed.choices, defaults_of(parsed.choices), origin)
    set_values = nested_values(parsed)
    lines = [*head, ""]
    # The other choices stand in the block of their group, as `name`.
    plain_choices = {group: choice for group, choice in parsed.choices.items() if group not in CHOSEN_BY_NAME}
    if plain_choices:
        lines += ["defaults:", *(f"  - {group}: {choice}" for group, choice in plain_choices.items()), ""]
    sentences = docstrings(RunConfig)  # the explanation of each group, by its name
    for name, annotation in get_type_hints(RunConfig).items():
        if name == "substitutions":  # what a run resolved itself: no setting
            continue
        if is_dataclass(annotation) or name in settings_classes():
            assert isinstance(annotation, type)
            block = _group_lines(name, annotation, set_values.get(name, {}), content)
        elif name == "batch":
            block = [
                *_comment_lines(sentences[name], ""),
                "batch:",
                *_batch_lines(set_values.get("batch", {}), content),
            ]
        else:
            default = getattr(content.defaults, name)
            block = [
                *_comment_lines(sentences[name], ""),
                *_setting_lines(name, name, set_values, default, "", content),
            ]
        if block:
            lines += [*block, ""]
    return "\n".join([*lines, *tail]).rstrip() + "\n"


def nested_values(parsed: ParsedOverrides) -> dict[str, Any]:
    """The values of all overrides as nested dictionaries, as YAML has them: `optim.lr=1e-4` becomes `{"optim": {"lr": 1e-4}}`."""
    tree: dict[str, Any] = {}
    for key, value, *_ in parsed.values:
        *parents, leaf = key.split(".")
        block = tree
        for parent in parents:
            block = block.setdefault(parent, {})
        leaf = leaf.removesuffix("_")  # fields whose name is a Python keyword end with _
        if isinstance(value, dict) and isinstance(block.get(leaf), dict):
            block[leaf].update(value)
        else:
            block[leaf] = value
    return tree


def yaml_value(value: Any) -> str:
    """A value in YAML, on one line."""
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


def _group_lines(name: str, annotation: type, set_values: dict[str, Any], content: FileContent) -> list[str]:
    """The lines of one group of settings, such as `optim`; empty if nothing in it is set or shown.

    `annotation` is the group's class, `set_values` are its values that are set. For example:
    ["# <docstring of the class>", "budget:", "  # <docstring of the setting>", "  steps: 100"]
    """
    group_defaults = getattr(content.defaults, name)
    settings_class = annotation
    lines: list[str] = []
    # A group of which one choice is made, such as `optim=adamw`: that is its `name`, and decides about the class.
    if name in CHOSEN_BY_NAME:
        typed_choice = content.choices.get(name)
        choice = typed_choice or str(yaml_value(group_defaults.name))
        if name in settings_classes():
            settings_class = settings_class_of(name, choice)
        choices = ", ".join(choices_by_group()[name])
        lines += _comment_lines(f"One of {choices}; docs/config.md lists the settings of each.", "  ")
        if typed_choice:
            lines.append(f"  name: {choice}{_origin_comment(name, content)}")
        else:
            lines.append(f"  # name: {choice}")
    lines += _block_lines(name, settings_class, group_defaults, set_values, content, depth=1)
    if not lines:
        return []
    # Above the group: the first paragraph of the class's docstring.
    about = []
    if settings_class.__doc__:
        first_paragraph = settings_class.__doc__.strip().split("\n\n")[0]
        about = _comment_lines(first_paragraph, "")
    if not lines[0]:  # an empty line stands between settings, not before the first one
        lines = lines[1:]
    return [*about, f"{name}:", *lines]


def _block_lines(
    prefix: str, settings_class: type, defaults: Any, set_values: dict[str, Any], content: FileContent, *, depth: int
) -> list[str]:
    """The lines of the settings of a class that are set or shown; an inner class is there if something in it is set.

    `prefix` is the dotted key of the block, `defaults` its object with defaults, `set_values` what is set in it, `depth` its
    level: 1 for a group. An empty line stands before each setting, the first one too.
    """
    lines: list[str] = []
    sentences = all_docstrings(settings_class)
    annotations = get_type_hints(settings_class)
    indent = "  " * depth
    for setting in fields(settings_class):
        name = setting.name.removesuffix("_")  # a field whose name is a Python keyword ends with _
        key = f"{prefix}.{name}"
        is_choice = depth == 1 and name == "name" and prefix in CHOSEN_BY_NAME
        # Left out: the group's `name`, which `_group_lines` writes, and what is neither set nor always shown.
        if is_choice or (name not in set_values and key not in SHOWN):
            continue
        default = getattr(defaults, setting.name)
        annotation = annotations[setting.name]
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            inner_lines = _block_lines(key, annotation, default, set_values[name], content, depth=depth + 1)
            if inner_lines:
                lines += ["", *_comment_lines(sentences[setting.name], indent), f"{indent}{name}:", *inner_lines[1:]]
        else:
            lines += ["", *_comment_lines(sentences[setting.name], indent)]
            lines += _setting_lines(key, name, set_values, default, indent, content)
    return lines


def _batch_lines(set_values: dict[str, Any], content: FileContent) -> list[str]:
    """The lines of the group `batch`, which is a dictionary and no class: both of its settings, set or commented out."""
    lines = []
    for name in ("global", "micro"):
        lines += _setting_lines(f"batch.{name}", name, set_values, content.defaults.batch[name], "  ", content)
    return lines


def _setting_lines(
    key: str, name: str, set_values: Mapping[str, Any], default: Any, indent: str, content: FileContent
) -> list[str]:
    """The lines of one setting: its value if it is set, else its default as a comment. A dictionary has a line an entry.

    `name` is its name in `set_values`, `key` its full dotted key.
    """
    if name not in set_values:
        return [f"{indent}# {name}: {yaml_value(default)}"]
    value = set_values[name]
    if not isinstance(value, dict) or not value:
        return [f"{indent}{yaml_value(name)}: {yaml_value(value)}{_origin_comment(key, content)}"]
    lines = [f"{indent}{yaml_value(name)}:{_origin_comment(key, content)}"]
    for entry_name in value:
        lines += _setting_lines(f"{key}.{entry_name}", entry_name, value, None, f"{indent}  ", content)
    return lines


def _origin_comment(key: str, content: FileContent) -> str:
    """A comment on what a setting was in another trainer's file; empty if it was typed."""
    if key not in content.origin:
        return ""
    one_line = " ".join(content.origin[key].split())
    return f"  # {one_line}"


def as_comments(sentences: list[str]) -> list[str]:
    """Sentences as lines of comments; an empty sentence is an empty comment."""
    lines = []
    for sentence in sentences:
        lines += _comment_lines(sentence, "") if sentence else ["#"]
    return lines


def _comment_lines(sentence: str, indent: str) -> list[str]:
    """A sentence as comment lines of at most `WIDTH` columns, each after `indent`; names and paths are never broken."""
    line_start = f"{indent}# "
    return textwrap.wrap(
        " ".join(sentence.split()),
        WIDTH,
        initial_indent=line_start,
        subsequent_indent=line_start,
        break_on_hyphens=False,
        break_long_words=False,
    )
