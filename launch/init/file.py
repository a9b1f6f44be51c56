"""Text of the settings file: what is set, and commented out below it the settings that people change most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, get_type_hints

from launch.config.choices import CONF_DIR, choices_by_group, register_schemas, settings_class_of, settings_classes
from launch.config.compose import hydra_words
from launch.config.user_files import CHOSEN_BY_NAME
from trainer.config.descriptions import all_docstrings, docstrings
from trainer.config.run import RunConfig

if TYPE_CHECKING:
    from launch.config.overrides import ParsedWords

WIDTH = 100
NAMES = """
run.dir run.seed model.path model.tokenizer model.attention model.quantisation data.path data.eval_path data.eval_share
data.format data.max_length data.packing data.over_length batch.global batch.micro budget.steps budget.epochs budget.tokens
precision tuning.targets tuning.rank tuning.alpha tuning.dropout tuning.modules_to_save objective.beta
strategy.activation_checkpointing strategy.compile strategy.offload_optimizer strategy.cpu_offload optim.lr
optim.weight_decay optim.max_grad_norm optim.betas schedule.warmup_steps schedule.warmup_share schedule.min_factor
evaluation.every_steps evaluation.patience checkpoint.every_steps checkpoint.every_minutes checkpoint.keep export.merge
logging.every_steps logging.wandb logging.project launcher.processes launcher.nodes launcher.partition launcher.account
launcher.time launcher.gpus_per_node
"""
SHOWN = frozenset(NAMES.split())
"""Settings that the file shows as comments if they are not set, unless the choices of the file lack them."""


def defaults_of(choices: Mapping[str, str]) -> RunConfig:
    """The settings under these choices, before any is set and while `auto` is still `auto`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        defaults: Any = OmegaConf.to_object(compose("train", hydra_words(dict(choices))))
    assert isinstance(defaults, RunConfig)
    return defaults


@dataclass(frozen=True, slots=True)
class FileContent:
    """What a file of settings is written from."""

    choices: Mapping[str, str]
    """The choices that were typed, by group."""
    defaults: RunConfig
    """Every setting under these choices, with its default."""
    origin: Mapping[str, str]
    """What a setting was in another trainer's file, by our key."""


def file_text(head: list[str], parsed: ParsedWords, origin: Mapping[str, str], tail: list[str]) -> str:
    """The whole file for words that compose. `origin`: what a setting was in another trainer's file, by our key."""
    content = FileContent(parsed.choices, defaults_of(parsed.choices), origin)
    set_values = nested(parsed)
    lines = [*head, ""]
    # The other choices stand in the block of their group, as `name`.
    plain_choices = {group: choice for group, choice in parsed.choices.items() if group not in CHOSEN_BY_NAME}
    if plain_choices:
        lines += ["defaults:", *(f"  - {group}: {choice}" for group, choice in plain_choices.items()), ""]
    sentences = docstrings(RunConfig)
    for name, annotation in get_type_hints(RunConfig).items():
        if name == "substitutions":
            continue
        if is_dataclass(annotation) or name in settings_classes():
            assert isinstance(annotation, type)
            block = _group(name, annotation, set_values.get(name, {}), content)
        elif name == "batch":
            block = [*_folded(sentences[name], ""), "batch:", *_batch(set_values.get("batch", {}), content)]
        else:
            default = getattr(content.defaults, name)
            block = [*_folded(sentences[name], ""), *_setting(name, name, set_values, default, "", content)]
        if block:
            lines += [*block, ""]
    return "\n".join([*lines, *tail]).rstrip() + "\n"


def nested(parsed: ParsedWords) -> dict[str, Any]:
    """The typed values as nested blocks."""
    tree: dict[str, Any] = {}
    for key, value, _ in parsed.values:
        *parents, last = key.split(".")
        block = tree
        for parent in parents:
            block = block.setdefault(parent, {})
        last = last.removesuffix("_")
        if isinstance(value, dict) and isinstance(block.get(last), dict):
            block[last].update(value)
        else:
            block[last] = value
    return tree


def dumped(value: Any) -> str:
    """A value in YAML, on one line."""
    import yaml

    text = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    # YAML ends a document that is one bare value with `...`.
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """A value without enums, which YAML cannot write."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value


def _group(name: str, annotation: type, set_values: dict[str, Any], content: FileContent) -> list[str]:
    """One block of the outermost level; empty if nothing in it is set or shown."""
    group_defaults = getattr(content.defaults, name)
    settings = annotation
    lines: list[str] = []
    if name in CHOSEN_BY_NAME:
        typed_choice = content.choices.get(name)
        choice = typed_choice or str(dumped(group_defaults.name))
        if name in settings_classes():
            settings = settings_class_of(name, choice)
        lines += _folded(
            f"One of {', '.join(choices_by_group()[name])}; docs/config.md lists the settings of each.", "  "
        )
        lines.append(f"  name: {choice}{_origin_comment(name, content)}" if typed_choice else f"  # name: {choice}")
    lines += _block(name, settings, group_defaults, set_values, content, depth=1)
    if not lines:
        return []
    about = []
    if settings.__doc__:
        about = _folded(settings.__doc__.strip().split("\n\n")[0], "")
    if not lines[0]:  # an empty line stands between settings, not before the first one
        lines = lines[1:]
    return [*about, f"{name}:", *lines]


def _block(
    prefix: str, settings: type, defaults: Any, set_values: dict[str, Any], content: FileContent, *, depth: int
) -> list[str]:
    """The settings of a class that are set or shown. An inner block stands there if it is set.

    `prefix`: the key of the block. `defaults`: its object. `set_values`: what is set in it. `depth`: 1 for a group.
    """
    lines: list[str] = []
    sentences = all_docstrings(settings)
    annotations = get_type_hints(settings)
    indent = "  " * depth
    for setting in fields(settings):
        name = setting.name.removesuffix("_")
        key = f"{prefix}.{name}"
        is_choice = depth == 1 and name == "name" and prefix in CHOSEN_BY_NAME
        if is_choice or (name not in set_values and key not in SHOWN):
            continue
        default = getattr(defaults, setting.name)
        annotation = annotations[setting.name]
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            inner_lines = _block(key, annotation, default, set_values[name], content, depth=depth + 1)
            if inner_lines:
                lines += ["", *_folded(sentences[setting.name], indent), f"{indent}{name}:", *inner_lines[1:]]
        else:
            lines += ["", *_folded(sentences[setting.name], indent)]
            lines += _setting(key, name, set_values, default, indent, content)
    return lines


def _batch(set_values: dict[str, Any], content: FileContent) -> list[str]:
    """The block `batch`, which is a table and no class: both of its settings, set or commented."""
    lines = []
    for name in ("global", "micro"):
        lines += _setting(f"batch.{name}", name, set_values, content.defaults.batch[name], "  ", content)
    return lines


def _setting(
    key: str, name: str, set_values: Mapping[str, Any], default: Any, indent: str, content: FileContent
) -> list[str]:
    """The lines of a setting: set, or commented with its default. A table has a line for each entry."""
    if name not in set_values:
        return [f"{indent}# {name}: {dumped(default)}"]
    value = set_values[name]
    if not isinstance(value, dict) or not value:
        return [f"{indent}{dumped(name)}: {dumped(value)}{_origin_comment(key, content)}"]
    lines = [f"{indent}{dumped(name)}:{_origin_comment(key, content)}"]
    for entry_name in value:
        lines += _setting(f"{key}.{entry_name}", entry_name, value, None, f"{indent}  ", content)
    return lines


def _origin_comment(key: str, content: FileContent) -> str:
    """What a setting was in the file that it is from, as a comment; empty if it was typed."""
    return f"  # {' '.join(content.origin[key].split())}" if key in content.origin else ""


def commented(sentences: list[str]) -> list[str]:
    """Sentences as comments; an empty one is an empty line."""
    lines = []
    for sentence in sentences:
        lines += _folded(sentence, "") if sentence else ["#"]
    return lines


def _folded(sentence: str, indent: str) -> list[str]:
    """A sentence as lines of comment."""
    begin = f"{indent}# "
    return textwrap.wrap(
        " ".join(sentence.split()),
        WIDTH,
        initial_indent=begin,
        subsequent_indent=begin,
        break_on_hyphens=False,
        break_long_words=False,
    )
