"""Text of the settings file: what is set, and commented out below it the settings that people change most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, get_type_hints

from launch.config.choices import CONF_DIR, groups, register_schemas, settings_of, variants
from launch.config.compose import hydra_words
from launch.config.user_files import CHOSEN_BY_NAME
from trainer.config.descriptions import all_docstrings, docstrings
from trainer.config.run import RunConfig

if TYPE_CHECKING:
    from launch.config.overrides import Parsed

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
"""Settings that are shown where they are not set; those that the choices of a file do not have are left out."""


def defaults_of(choices: Mapping[str, str]) -> RunConfig:
    """The settings under these choices, before any is set and before `auto` becomes anything."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        found: Any = OmegaConf.to_object(compose("train", hydra_words(dict(choices))))
    assert isinstance(found, RunConfig)
    return found


def text(head: list[str], parsed: Parsed, origin: Mapping[str, str], tail: list[str]) -> str:
    """The whole file of words that compose. `origin` says of a key what it was elsewhere."""
    given, whole = nested(parsed), defaults_of(parsed.choices)
    chosen = {group: choice for group, choice in parsed.choices.items() if group not in CHOSEN_BY_NAME}
    lines = [*head, ""]
    if chosen:
        lines += ["defaults:", *(f"  - {group}: {choice}" for group, choice in chosen.items()), ""]
    told = docstrings(RunConfig)
    for name, hint in get_type_hints(RunConfig).items():
        if name == "substitutions":
            continue
        if is_dataclass(hint) or name in variants():
            assert isinstance(hint, type)
            block = _group(name, hint, parsed, given.get(name, {}), whole, origin)
            lines += [*block, ""] if block else []
        elif name == "batch":
            lines += [*_folded(told[name], ""), "batch:", *_batch(given.get("batch", {}), whole, origin), ""]
        else:
            lines += [*_folded(told[name], ""), *_setting(name, name, given, getattr(whole, name), "", origin), ""]
    return "\n".join([*lines, *tail]).rstrip() + "\n"


def nested(parsed: Parsed) -> dict[str, Any]:
    """The values of the words as blocks."""
    tree: dict[str, Any] = {}
    for key, value, _ in parsed.values:
        *above, last = key.split(".")
        block = tree
        for part in above:
            block = block.setdefault(part, {})
        last = last.removesuffix("_")
        if isinstance(value, dict) and isinstance(block.get(last), dict):
            block[last].update(value)
        else:
            block[last] = value
    return tree


def dumped(value: Any) -> str:
    """A value in YAML, on one line; nothing in it is looked up when it is read again."""
    import yaml

    said = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return said.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _group(
    name: str, hint: type, parsed: Parsed, given: dict[str, Any], whole: RunConfig, origin: Mapping[str, str]
) -> list[str]:
    """One block of the outermost level; empty where nothing of it is set or shown."""
    holder, lines = getattr(whole, name), list[str]()
    settings = hint
    if name in CHOSEN_BY_NAME:
        current = parsed.choices.get(name)
        choice = current or str(dumped(holder.name))
        settings = settings_of(name, choice) if name in variants() else hint
        said = f"One of {', '.join(groups()[name])}; docs/config.md lists the settings of each."
        mark = "" if current else "# "
        lines += [*_folded(said, "  "), f"  {mark}name: {choice}{_was(name, origin) if current else ''}"]
    lines += _block(name, settings, holder, given, whole, origin, 1)
    about = [] if not settings.__doc__ else _folded(settings.__doc__.strip().split("\n\n")[0], "")
    return [*about, f"{name}:", *(lines[1:] if not lines[0] else lines)] if lines else []


def _block(
    prefix: str,
    settings: type,
    holder: Any,
    given: dict[str, Any],
    whole: RunConfig,
    origin: Mapping[str, str],
    deep: int,
) -> list[str]:
    """The settings of a class that are set or shown, those of its inner blocks where one of them is set."""
    lines, told, hints, indent = list[str](), all_docstrings(settings), get_type_hints(settings), "  " * deep
    for each in fields(settings):
        name = each.name.removesuffix("_")
        key, inner = f"{prefix}.{name}", hints[each.name]
        chosen = deep == 1 and name == "name" and prefix in CHOSEN_BY_NAME
        if chosen or (name not in given and key not in SHOWN):
            continue
        value = getattr(holder, each.name)
        if is_dataclass(inner):
            assert isinstance(inner, type)
            below = _block(key, inner, value, given[name], whole, origin, deep + 1)
            lines += ["", *_folded(told[each.name], indent), f"{indent}{name}:", *below[1:]] if below else []
            continue
        lines += ["", *_folded(told[each.name], indent), *_setting(key, name, given, value, indent, origin)]
    return lines


def _batch(given: dict[str, Any], whole: RunConfig, origin: Mapping[str, str]) -> list[str]:
    names = ("global", "micro")
    return [line for name in names for line in _setting(f"batch.{name}", name, given, whole.batch[name], "  ", origin)]


def _setting(
    key: str, name: str, given: Mapping[str, Any], default: Any, indent: str, origin: Mapping[str, str]
) -> list[str]:
    """The line of a setting: set, or commented with the value it has; a table has a line for each entry."""
    if name not in given:
        return [f"{indent}# {name}: {dumped(default)}"]
    value = given[name]
    if not isinstance(value, dict) or not value:
        return [f"{indent}{dumped(name)}: {dumped(value)}{_was(key, origin)}"]
    lines = [f"{indent}{dumped(name)}:{_was(key, origin)}"]
    for inner in value:
        lines += _setting(f"{key}.{inner}", inner, value, None, f"{indent}  ", origin)
    return lines


def _was(key: str, origin: Mapping[str, str]) -> str:
    """What a setting was in the file that it is from, as a comment."""
    return f"  # {' '.join(origin[key].split())}" if key in origin else ""


def commented(lines: list[str]) -> list[str]:
    """Sentences as comments."""
    return [folded for line in lines for folded in (_folded(line, "") if line else ["#"])]


def _folded(said: str, indent: str) -> list[str]:
    said = " ".join(said.split())
    begin = f"{indent}# "
    return textwrap.wrap(
        said, WIDTH, initial_indent=begin, subsequent_indent=begin, break_on_hyphens=False, break_long_words=False
    )
