"""Writes the recipes: their files in conf/experiment, and a page for each family in docs/recipes.

python docs/make_recipes.py

The table is `docs/recipe_table.py`, the planned numbers are docs/recipes/planned.json (`docs/plan_recipes.py`). A recipe that
does not fit its cards is an error here: it gets no file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import yaml  # noqa: E402
from plan_recipes import planned, up_to_date  # noqa: E402
from recipe_files import METHODS, card_of, command, hub_id, recipe_file  # noqa: E402
from recipe_table import RECIPES, TASKS, WANTED, Recipe  # noqa: E402

from trainer.model.known_shapes import KnownShape, names_by_hub_id, read_shape, shape_names  # noqa: E402

EXPERIMENTS = ROOT / "conf" / "experiment"
PAGES = ROOT / "docs" / "recipes"
MEASURED_PLANS = ROOT / "benchmarks" / "results" / "planning.json"
INDEX = "README.md"


def slug(family: str) -> str:
    """The name of a family's page, without its ending."""
    return family.lower().replace(" ", "-")


def family_of(recipe: Recipe) -> str:
    """The family of a recipe's model."""
    return read_shape(recipe.model).family


def families() -> list[str]:
    """The families that have a shape, in alphabetical order."""
    return sorted({read_shape(name).family for name in shape_names()}, key=str.lower)


def hand_written() -> dict[str, list[tuple[str, str]]]:
    """(name, first sentence) of the experiments that are no row of the table, by the family of their model."""
    made = {recipe.name for recipe in RECIPES}
    found: dict[str, list[tuple[str, str]]] = {family: [] for family in families()}
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        if file.stem in made:
            continue
        text = file.read_text(encoding="utf-8")
        comments = [line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")]
        head = " ".join(comments)
        sentence = head.partition(". ")[0].partition(" Command: ")[0].rstrip(".") + "."
        shape = names_by_hub_id().get(yaml.safe_load(text)["model"]["path"])
        if shape is not None:
            found[read_shape(shape).family].append((file.stem, sentence))
    return found


def published(shape: KnownShape) -> str:
    """The published parameters of a shape: 8,030,261,248, or as the publisher rounds them."""
    return f"{shape.parameters:,}" if isinstance(shape.parameters, int) else shape.parameters


def address(source: str) -> str:
    """A source as a link, and what stands behind its address."""
    url, _, more = source.partition(" ")
    link = f"[{url.removeprefix('https://').partition('/')[0]}]({url.rstrip(',')})"
    return f"{link} {more}" if more else link


def models_table(family: str) -> list[str]:
    """A row for each shape of a family."""
    lines = [
        "| `model=` | Hugging Face Hub id | published parameters | layer sizes taken from | date of the source |",
        "|---|---|---|---|---|",
    ]
    for name in shape_names():
        shape = read_shape(name)
        if shape.family == family:
            count = f"[{published(shape)}]({shape.parameters_from.partition(' ')[0]})"
            lines.append(f"| `{name}` | `{shape.hub[0]}` | {count} | {address(shape.source)} | {shape.date} |")
    return lines


def cards(recipe: Recipe) -> str:
    """The cards of a recipe: `4 x a10g`, `2 nodes x 8 x h200`."""
    hosts = "" if recipe.nodes == 1 else f"{recipe.nodes} nodes x "
    return f"{hosts}{recipe.gpus} x `{recipe.card}`"


def recipes_table(rows: list[Recipe], table: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each recipe, with what is planned of it."""
    lines = [
        "| recipe | task | method | GPUs | planned memory per GPU (GiB) | tokens/s, at most | $ per million tokens, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in rows:
        numbers = up_to_date(recipe, table)
        memory = speed = price = "not planned yet"
        if numbers is not None:
            memory = f"{numbers['gib']} of {numbers['card_gib']:.1f}"
            round_s = numbers["round_s"]
            speed = f"{numbers['tokens_per_s']:,}" if round_s is None else f"a round: {round_s:,.0f} s at least"
            cost = numbers["usd_per_million_tokens"]
            price = "-" if cost is None else f"{cost:.2f}"
        cells = [f"`{recipe.name}`", recipe.task, METHODS[recipe.method], cards(recipe), memory, speed, price]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured_errors() -> list[str]:
    """How far plans were from measured runs, by card: the table beside every table of planned numbers."""
    rows = json.loads(MEASURED_PLANS.read_text(encoding="utf-8"))["rows"]
    own = [row for row in rows if row["strategy"] == "single" and row["own_kind"]]
    memory = max(abs(row["off_percent"]) for row in own)
    speeds = [row["speed_off_percent"] for row in own if row["speed_off_percent"] is not None]
    return [
        "| GPUs, measured by others | error of planned memory | error of planned speed |",
        "|---|---|---|",
        f"| one A100 80 GB, 7B and 8B, LoRA and QLoRA, {len(own)} runs | at most {memory:.1f} % | {min(speeds):+.1f} to "
        f"{max(speeds):+.1f} % of the measured speed |",
        "| 64 A100 80 GB, 8B and 70B, FSDP2, 2 runs | memory was not published | planned 11 and 13 % too high |",
        "| 8 H100, limited to 500 W, 8B, FSDP2, 1 run | planned 5 % too high | planned 54 % too high |",
        "| every other GPU | unknown | unknown |",
    ]


def example(family: str, rows: list[Recipe]) -> Recipe:
    """The recipe that a page shows as an example: the first on one host."""
    return next(recipe for recipe in rows if recipe.nodes == 1)


def family_page(family: str, table: dict[str, dict[str, Any]]) -> str:
    """The page of a family: its recipes with what is planned of them, and its models."""
    rows = [recipe for recipe in RECIPES if family_of(recipe) == family]
    lines = [f"# Recipes: {family}", ""]
    if rows:
        lines += recipes_section(family, rows, table)
    further = hand_written()[family]
    if further:
        lines += [
            "## Further recipes",
            "",
            "These recipes are written by hand. The comments at the top of each file in `conf/experiment` say what to expect.",
            "",
        ]
        lines += ["| recipe | what it does |", "|---|---|"]
        lines += [f"| `{name}` | {sentence} |" for name, sentence in further]
        lines.append("")
    lines += [
        "## Models",
        "",
        "With these values of `model=`, you can use `shardtune plan`, `submit --print` and `--dry-run` without downloading",
        "anything. To train, download the weights and the tokenizer first: `shardtune download model.path=<Hub id>`.",
        "",
        *models_table(family),
        "",
        "## Tested how",
        "",
        "The tests compose the settings of each recipe, build each model without memory and count its parameters. No recipe was",
        "run on its GPUs. `docs/make_recipes.py` makes this page. [All families](README.md#tested-how) lists all tests.",
    ]
    return "\n".join(lines) + "\n"


def recipes_section(family: str, rows: list[Recipe], table: dict[str, dict[str, Any]]) -> list[str]:
    """How to start and change a recipe, the table of recipes, and how far to trust its numbers."""
    shown = example(family, rows)
    data_rows = {TASKS[recipe.task].rows for recipe in rows if recipe.task == shown.task}
    if any(up_to_date(recipe, table) is not None for recipe in rows):
        expected = "This page lists the recipes of this family, with the planned memory, speed and price."
    else:
        expected = (
            "This page lists the recipes of this family. None of them was planned yet: plan one before you rent GPUs."
        )
    return [
        f"A recipe is a complete run that one command starts. {expected}",
        "",
        "```bash",
        f"shardtune download model.path={hub_id(shown)}",
        *command(shown),
        "```",
        "",
        f"Each row of `{TASKS[shown.task].data_path}` must have {data_rows.pop()}.",
        "",
        "To change a setting of the recipe, add it to the command, for example `data.max_length=1024`. To see first how the",
        "change affects memory, speed and price, give the recipe, the change and the GPUs to `shardtune plan`:",
        "",
        "```bash",
        f"shardtune plan experiment={shown.name} data.max_length=1024 hardware={shown.card} "
        f"launcher.gpus_per_node={shown.gpus}",
        "```",
        "",
        *recipes_table(rows, table),
        "",
        "**All numbers are planned, not measured.**",
        "",
        "- The plan assumes that every document has the full length, `data.max_length`.",
        "- Memory is the peak memory of the GPU that needs most, next to the memory that a GPU of this type has.",
        "- Speed is that of all GPUs together.",
        "- The price is for training alone, at the list price in the GPU's file in `conf/hardware`.",
        "",
        "How far plans were from measurements of published runs ([details](../evidence/plans.md)):",
        "",
        *measured_errors(),
        "",
    ]


def index_page(table: dict[str, dict[str, Any]]) -> str:
    """The page of all families, and of those without a recipe."""
    further = hand_written()
    total = len(RECIPES) + sum(len(names) for names in further.values())
    with_numbers = sum(up_to_date(recipe, table) is not None for recipe in RECIPES)
    lines = [
        "# Recipes",
        "",
        f"shardtune comes with {total} recipes: complete runs that you start with one command. This page lists their families.",
        "Each family's page has the commands, their planned memory, speed and price, and the published layer sizes of the",
        "models.",
        "",
        "| family | models | recipes |",
        "|---|---|---|",
    ]
    for family in families():
        models = sum(read_shape(name).family == family for name in shape_names())
        count = sum(family_of(recipe) == family for recipe in RECIPES) + len(further[family])
        lines.append(f"| [{family}]({slug(family)}.md) | {models} | {count} |")
    lines += [
        "",
        "## Tasks",
        "",
        "A recipe's name consists of the model, the task and the strategy, for example `qwen3_8b_tools_fsdp2`. If the task is",
        "*instruction*, the name has the tuning method instead of the task, for example `qwen3_14b_lora_zero3`.",
        "",
        "| task | what the model learns | what each row of the data must have |",
        "|---|---|---|",
        *(f"| {name} | {task.does} | {task.rows} |" for name, task in TASKS.items()),
        "",
        "## Wanted",
        "",
        "These models have no recipe yet:",
        "",
        "| models | why there is no recipe |",
        "|---|---|",
        *(f"| {models} | {reason} |" for models, reason in WANTED.items()),
        "",
        "You can plan a run of any model that has a `config.json`: `shardtune plan model.path=<directory> hardware=...`.",
        "",
        "## Tested how",
        "",
        "- A test composes the settings of every recipe, and compares its file with the table of recipes.",
        "- A test builds every model without memory and compares the number of its parameters with the published one.",
        "- `make test` repeats the plan of one recipe for each strategy, `make test-all` the plans of all recipes.",
        f"- `python docs/plan_recipes.py` plans recipes. {with_numbers} of the {len(RECIPES)} recipes of the table are planned.",
        "- No recipe was run on its GPUs.",
    ]
    return "\n".join(lines) + "\n"


def made_files() -> dict[Path, str]:
    """Every file that this script writes, with its text. Errors: ValueError for a recipe that does not fit its cards."""
    table = planned()
    files = {}
    for recipe in RECIPES:
        numbers = up_to_date(recipe, table)
        if numbers is not None and not numbers["fits"]:
            raise ValueError(
                f"{recipe.name}: needs {numbers['gib']} GiB of {numbers['card_gib']} GiB on {card_of(recipe)['name']}; change "
                "its row of docs/recipe_table.py"
            )
        page = f"docs/recipes/{slug(family_of(recipe))}.md"
        files[EXPERIMENTS / f"{recipe.name}.yaml"] = recipe_file(recipe, numbers, page)
    for family in families():
        files[PAGES / f"{slug(family)}.md"] = family_page(family, table)
    files[PAGES / INDEX] = index_page(table)
    return files


def main() -> None:
    """Write the files that have changed."""
    PAGES.mkdir(exist_ok=True)
    for file, text in made_files().items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
