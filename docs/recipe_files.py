"""The files of recipes in conf/experiment, made of the rows of `docs/recipe_table.py`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml
from recipe_table import TASKS, Recipe

from trainer.model.known_shapes import read_shape
from trainer.optim.config import OptimConfig
from trainer.optim.rates import usual_learning_rate

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"full": "full tuning", "lora": "LoRA", "qlora": "LoRA on a 4-bit base model (QLoRA)"}
STRATEGIES = {
    "single": "on one GPU",
    "ddp": "under DDP",
    "zero1": "under ZeRO-1",
    "zero2": "under ZeRO-2",
    "zero3": "under ZeRO-3",
    "fsdp2": "under FSDP2",
    "hsdp": "under HSDP: FSDP2 within each host, replicas between hosts",
}
FROM_A_BASE = ("pretrain", "orpo")
"""Tasks that begin with the base model and not with the one tuned on instructions."""


def hub_id(recipe: Recipe) -> str:
    """The hub id of the model that a recipe tunes."""
    ids = read_shape(recipe.model).hub
    return ids[1] if recipe.task in FROM_A_BASE else ids[0]


def card_of(recipe: Recipe) -> dict[str, Any]:
    """The figures of a recipe's card."""
    return yaml.safe_load((ROOT / "conf" / "hardware" / f"{recipe.card}.yaml").read_text(encoding="utf-8"))


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested keys of both; those of the second count."""
    result = dict(first)
    for key, value in second.items():
        both_nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_nested else value
    return result


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe's file as nested keys, `defaults` first."""
    task = TASKS[recipe.task]
    tuning = "full" if recipe.method == "full" else "lora"
    chosen = {
        "objective": (task.objective, "sft"),
        "tuning": (tuning, "full"),
        "strategy": (recipe.strategy, "single"),
        "schedule": (task.schedule, "cosine"),
    }
    overrides = [{f"override /{group}": choice} for group, (choice, default) in chosen.items() if choice != default]
    rate = usual_learning_rate(OptimConfig(), tuning, task.objective)
    assert rate is not None
    model: dict[str, Any] = {"path": hub_id(recipe)}
    if recipe.method == "qlora":
        model["quantisation"] = "nf4"
    tree: dict[str, Any] = {
        "defaults": [*overrides, "_self_"],
        "model": model,
        "data": {"max_length": recipe.length, "eval_share": 0.02},
        "batch": {"global": recipe.batch[0], "micro": recipe.batch[1]},
        "optim": {"lr": rate.usual},
    }
    if recipe.recompute != "none":
        tree["strategy"] = {"activation_checkpointing": recipe.recompute}
    tree = merged(merged(tree, task.settings), recipe.settings)
    tree.setdefault("budget", {"epochs": 1})
    if recipe.method == "qlora":
        tree["precision"] = "bf16"
    return tree


def model_name(recipe: Recipe) -> str:
    """The model's own name, such as `Qwen3-8B`."""
    return hub_id(recipe).rpartition("/")[2]


def title(recipe: Recipe) -> str:
    """The sentence of a recipe."""
    does = f"{model_name(recipe)} learns {TASKS[recipe.task].does}"
    return f"{does}. {METHODS[recipe.method][0].upper()}{METHODS[recipe.method][1:]} {STRATEGIES[recipe.strategy]}."


def hardware(recipe: Recipe, numbers: dict[str, Any] | None) -> str:
    """The cards that a recipe is planned for; or is meant for, as long as nothing is planned of it."""
    card = card_of(recipe)
    total = recipe.gpus * recipe.nodes
    gpus = "1 GPU" if total == 1 else f"{total} GPUs"
    where = ""
    if recipe.nodes > 1:
        where = f", {recipe.gpus} on each host"
    elif total > 1:
        where = " on one host"
    if numbers is None:
        return f"meant for {gpus} such as {card['name']} ({card['memory_gib']:.1f} GiB){where}. Plan it first."
    return f"{gpus} with {card['memory_gib']:.1f} GiB or more{where}, such as {card['name']}."


def planned_sentence(numbers: dict[str, Any] | None) -> str:
    """What is planned of a recipe; "not planned" without numbers."""
    if numbers is None:
        return "neither run nor planned yet, so it may not fit on these GPUs; `shardtune plan` tells you."
    parts = [f"planned, not run: {numbers['gib']} GiB of {numbers['card_gib']:.1f} GiB on each GPU"]
    if numbers["round_s"] is not None:
        parts.append(f"at least {numbers['round_s']:,.0f} s for a round, if each answer has its full length")
    else:
        parts.append(f"at most {numbers['tokens_per_s']:,} tokens/s of all GPUs")
    if numbers["usd_per_million_tokens"] is not None:
        parts.append(f"at least ${numbers['usd_per_million_tokens']:.2f} for a million tokens")
    return ", ".join(parts) + "."


def command(recipe: Recipe) -> list[str]:
    """The command of a recipe, and the one for each host where it takes several."""
    train = f"shardtune train experiment={recipe.name} data.path={TASKS[recipe.task].data_path}"
    if recipe.nodes == 1:
        return [train]
    submit = train.replace("train", "submit", 1)
    return [
        f"{submit} launcher.nodes={recipe.nodes} launcher.gpus_per_node={recipe.gpus}",
        f"On each host by torchrun: {train}",
    ]


def recipe_file(recipe: Recipe, numbers: dict[str, Any] | None, page: str) -> str:
    """The text of a recipe's file. `numbers`: what is planned of it; `page`: the page of its family."""
    head = [*wrapped(f"{title(recipe)} Each row of the data has {TASKS[recipe.task].rows}.", "# ", "# ")]
    first, *further = command(recipe)
    head.append(f"# Command:  {first}")
    head += [f"#           {line}" for line in further]
    head += wrapped(hardware(recipe, numbers), "# Hardware: ", "#           ")
    expect = f"{planned_sentence(numbers)} {page} says how accurate such plans are."
    head += wrapped(expect, "# Expect:   ", "#           ")
    body = yaml.dump(recipe_tree(recipe), Dumper=Indented, sort_keys=False, default_flow_style=None, width=110)
    return "\n".join(["# @package _global_", *head, body])


def wrapped(text: str, first: str, other: str) -> list[str]:
    """Lines of at most 120 columns that begin as given."""
    return textwrap.wrap(
        text, 120, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    )


class Indented(yaml.SafeDumper):
    """YAML as the other files of conf/ are written: lists below their key are indented, mappings are never in one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        """Indent lists too."""
        return super().increase_indent(flow, False)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.Node:
        """A mapping over several lines."""
        return super().represent_mapping(tag, mapping, flow_style=False)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    """A learning rate as 2.0e-4, which every YAML reader takes as a number."""
    text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+") if 0 < abs(value) < 1e-3 else repr(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


Indented.add_representer(float, _number)
