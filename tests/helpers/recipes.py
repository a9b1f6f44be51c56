"""The table of recipes, for tests: docs/ is no package, so its scripts are read from there."""

import sys
from importlib import import_module

from tests.helpers.covering import EVERYTHING, cover
from tests.helpers.launching import ROOT

sys.path.append(str(ROOT / "docs"))
recipe_table = import_module("recipe_table")
RECIPES = recipe_table.RECIPES
RECIPE_NAMES = {recipe.name for recipe in RECIPES}


def chosen_names() -> set[str]:
    """Names of recipes with every task, method and strategy of the table; of all where everything is tested."""
    if EVERYTHING:
        return RECIPE_NAMES
    few = cover(RECIPES, lambda recipe: {recipe.task, recipe.method, recipe.strategy, recipe.nodes > 1})
    return {recipe.name for recipe in few}
