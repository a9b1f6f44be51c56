"""Recipes: files and pages are those of the table, today's names stay, and planned numbers are planned again."""

from importlib import import_module

import pytest

from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import ROOT
from tests.helpers.recipes import RECIPE_NAMES, RECIPES

make_recipes = import_module("make_recipes")
plan_recipes = import_module("plan_recipes")
PLANNED = plan_recipes.planned()
EARLIER = (
    *("deepseek_v3_lora_fsdp2", "distilbert_classification", "falcon_7b_lora_fsdp2", "gemma2_2b_lora_zero2"),
    *("gpt2_full_ddp", "llama2_7b_lora_fsdp2", "llama3_8b_1m_full_fsdp2", "llama3_8b_1m_lora_fsdp2"),
    *("llama3_8b_3m_lora_fsdp2", "llama3_8b_lora_fsdp2", "llama3_8b_pretrain_fsdp2", "llama3_8b_qlora_single"),
    *("minilm_classification", "minilm_classification_lora", "qwen2_5_0_5b_distil_fsdp2", "qwen2_5_0_5b_dpo_lora"),
    *("qwen2_5_0_5b_kto_lora", "qwen2_5_0_5b_orpo_lora", "qwen2_5_0_5b_reward_lora", "qwen2_5_0_5b_simpo_lora"),
    *("qwen2_5_1_5b_grpo_lora", "qwen2_5_7b_full_zero3", "qwen3_30b_a3b_lora_fsdp2", "qwen3_8b_dapo_fsdp2"),
    "t5_small_summarisation",
)
"""Names that people have typed before there was a table."""


def cheapest_by_strategy():
    """The planned recipe with the smallest model of each strategy: `make test` plans these again."""
    found = {}
    for recipe in RECIPES:
        if recipe.name not in PLANNED or recipe.task == "distil":
            continue  # test_every_recipe_is_planned names what is not planned; a teacher makes a plan slow
        smallest = found.get(recipe.strategy)
        if smallest is None or PLANNED[recipe.name]["parameters"] < PLANNED[smallest.name]["parameters"]:
            found[recipe.strategy] = recipe
    return list(found.values())


def test_files_and_pages_are_those_of_the_table():
    made = make_recipes.made_files()
    assert len(made) > 60 + 14
    stale = [path.name for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/make_recipes.py"
    pages = {path.name for path in (ROOT / "docs" / "recipes").glob("*.md")}
    assert pages == {path.name for path in made if path.suffix == ".md"}


def test_every_recipe_is_planned():
    behind = [recipe.name for recipe in RECIPES if plan_recipes.up_to_date(recipe, PLANNED) is None]
    assert behind == [], "run: python docs/plan_recipes.py, then python docs/make_recipes.py"


def test_names_of_earlier_experiments_stay():
    assert not RECIPE_NAMES & {*EARLIER}
    assert [name for name in EARLIER if not (ROOT / "conf" / "experiment" / f"{name}.yaml").exists()] == []


def test_a_recipe_that_does_not_fit_gets_no_file(monkeypatch):
    recipe = RECIPES[0]
    too_large = {"of": plan_recipes.fingerprint(recipe), "fits": False, "gib": 30.0, "card_gib": 22.0}
    monkeypatch.setattr(make_recipes, "planned", lambda: {recipe.name: too_large})
    with pytest.raises(ValueError, match=f"{recipe.name}: needs 30.0 GiB of 22.0 GiB"):
        make_recipes.made_files()


def test_a_page_promises_numbers_only_where_a_recipe_of_the_family_was_planned():
    assert "None of them was planned yet" in make_recipes.family_page("Llama", {})
    assert "the planned memory" not in make_recipes.family_page("Llama", {})
    assert "the planned memory" in make_recipes.family_page("Llama", PLANNED)


def test_numbers_of_other_settings_are_not_shown():
    recipe = RECIPES[0]
    assert plan_recipes.up_to_date(recipe, {recipe.name: {"of": "something else", "fits": True}}) is None


@pytest.mark.parametrize("recipe", RECIPES if EVERYTHING else cheapest_by_strategy(), ids=lambda recipe: recipe.name)
def test_planned_numbers_are_planned_again(recipe):
    kept = plan_recipes.up_to_date(recipe, PLANNED)
    assert kept is not None, "run: python docs/plan_recipes.py"
    found = plan_recipes.plan_recipe(recipe)
    assert found["fits"]
    for key in ("parameters", "trained"):
        assert found[key] == kept[key]
    for key in ("gib", "tokens_per_s", "round_s"):
        assert found[key] == (kept[key] if kept[key] is None else pytest.approx(kept[key], rel=0.02)), key
