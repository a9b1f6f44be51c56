"""Plans recipes and keeps the numbers in docs/recipes/planned.json: `python docs/plan_recipes.py [recipe ...]`.

A recipe is planned as its file says, on its own cards. What is planned already, of the same settings, shape and card, is left as
it is, so that an interrupted run goes on where it was. Without names, all recipes are planned.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from recipe_files import recipe_tree  # noqa: E402
from recipe_table import RECIPES, Recipe  # noqa: E402

from launch.plan.command import compose_planned_run, read_plan_request  # noqa: E402
from launch.plan.job import prepare_planned_job  # noqa: E402
from strategies.errors import ConfigError  # noqa: E402
from trainer.model.known_shapes import read_shape  # noqa: E402
from trainer.planner.hardware import GIB  # noqa: E402
from trainer.planner.sweep import plan_variants  # noqa: E402
from trainer.planner.variants import list_variants  # noqa: E402

PLANNED = ROOT / "docs" / "recipes" / "planned.json"


def fingerprint(recipe: Recipe) -> str:
    """A digest of what decides the planned numbers of a recipe: its settings, the shape of its model and its card."""
    card = (ROOT / "conf" / "hardware" / f"{recipe.card}.yaml").read_text(encoding="utf-8")
    parts = [recipe_tree(recipe), read_shape(recipe.model).config, recipe.nodes, recipe.gpus, card]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def plan_words(recipe: Recipe) -> list[str]:
    """The words of `shardtune plan` for a recipe, exactly as its file says, on its own cards."""
    tree = recipe_tree(recipe)
    return [
        f"experiment={recipe.name}",
        f"hardware={recipe.card}",
        f"launcher.nodes={recipe.nodes}",
        f"launcher.gpus_per_node={recipe.gpus}",
        f"strategy={recipe.strategy}",
        f"strategy.activation_checkpointing={recipe.recompute}",
        f"parallel.experts={tree.get('parallel', {}).get('experts', 1)}",
        f"parallel.sequence={tree.get('parallel', {}).get('sequence', 1)}",
        f"batch.global={recipe.batch[0]}",
        f"batch.micro={recipe.batch[1]}",
        "plan.workers=1",
    ]


def plan_recipe(recipe: Recipe) -> dict[str, Any]:
    """The planned numbers of a recipe whose file exists, as JSON values. Errors: ConfigError if it cannot be planned."""
    request = read_plan_request(plan_words(recipe))
    config, typed = compose_planned_run(request.run_overrides, request.card)
    ranks = recipe.nodes * recipe.gpus
    variants = list_variants(config, request.settings, typed, ranks)
    job = prepare_planned_job(config, request.card)
    answer = plan_variants(variants, job, recipe.batch[1], request.settings, lambda *_: None)
    choice = answer.best_choices[0]
    price = request.card.price_per_hour
    per_million = None
    if price is not None and choice.round_time is None:
        per_million = price * ranks / 3600 / choice.tokens_per_s * 1e6
    return {
        "of": fingerprint(recipe),
        "fits": choice.fits,
        "gib": round(choice.memory_fit.needed_bytes / GIB, 1),
        "card_gib": request.card.memory_gib,
        "host_gib": round(choice.needed_host_gib),
        "tokens_per_s": None if choice.round_time is not None else round(choice.tokens_per_s),
        "round_s": None if choice.round_time is None else round(choice.round_time.total_s, 1),
        "usd_per_million_tokens": None if per_million is None else round(per_million, 3),
        "parameters": answer.cost_model.num_parameters,
        "trained": answer.cost_model.num_trained_parameters,
    }


def planned() -> dict[str, dict[str, Any]]:
    """What is planned: numbers by the name of the recipe."""
    return json.loads(PLANNED.read_text(encoding="utf-8")) if PLANNED.exists() else {}


def up_to_date(recipe: Recipe, table: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The planned numbers of a recipe; None if it has none, or if its settings, shape or card have changed since."""
    numbers = table.get(recipe.name)
    return numbers if numbers is not None and numbers["of"] == fingerprint(recipe) else None


def main(names: list[str]) -> None:
    """Plan the recipes of these names (none: all) that have no numbers yet, and write the table after each."""
    for recipe in RECIPES:
        table = planned()
        if (names and recipe.name not in names) or up_to_date(recipe, table) is not None:
            continue
        try:
            numbers = plan_recipe(recipe)
        except ConfigError as error:
            print(f"{recipe.name}: cannot be planned: {error}", flush=True)
            continue
        verdict = "" if numbers["fits"] else " DOES NOT FIT"
        print(f"{recipe.name}: {numbers['gib']} of {numbers['card_gib']} GiB{verdict}", flush=True)
        current_names = {row.name for row in RECIPES}
        table = {name: row for name, row in (table | {recipe.name: numbers}).items() if name in current_names}
        PLANNED.parent.mkdir(exist_ok=True)
        PLANNED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
