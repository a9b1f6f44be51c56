"""Every objective, schedule, task and tracker is on its page; objectives have tests, curves and words of other trainers."""

import re
from pathlib import Path

import pytest

from launch.config.choices import choices_by_group
from launch.config.importers import rules
from tests import curves, house_rules
from tests.helpers.launching import ROOT
from tests.helpers.objectives import OBJECTIVE_TESTS, variants_of
from trainer.data.store.sequences import REFERENCE
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.objectives.preference import DpoConfig, PairLoss
from trainer.objectives.registry import FAMILIES, build_objective, data_spec_of
from trainer.optim.schedule import ScheduleName
from trainer.reporting.trackers import registry as trackers

WORDS_OF_EVERY_ROOM = {"sft", "pretrain", "reward"}
"""Objectives whose names trainer/data and strategies may use for other things."""
VARIANTS = variants_of(*OBJECTIVE_TESTS)


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_every_objective_has_a_row_of_tests():
    assert list(OBJECTIVE_TESTS) == [name for name in FAMILIES if name in OBJECTIVE_TESTS], "in the registry's order"
    assert set(OBJECTIVE_TESTS) == set(FAMILIES), "give the objective a row in tests/helpers/objectives.py"
    for name, tests in OBJECTIVE_TESTS.items():
        assert name in tests.variants, name
        assert all(variant.name == name for variant in tests.variants.values()), name


def test_every_loss_type_is_a_variant():
    tested = {variant.loss_type for variant in VARIANTS.values() if isinstance(variant, DpoConfig)}
    assert tested == set(PairLoss)
    assert {*rules.LOSS_TYPES_OF_DPO, PairLoss.sigmoid.value} == {loss_type.value for loss_type in PairLoss}


@pytest.mark.parametrize("name", FAMILIES)
def test_objective_has_an_oracle_parity_docs_curves_and_importer_words(name):
    tests = OBJECTIVE_TESTS[name]
    settings = FAMILIES[name].settings.__name__
    assert settings in text(tests.oracle) or f'"{name}"' in text(tests.oracle) or name == "sft", (
        f"{tests.oracle} compares no loss of {name}"
    )
    parity = text(f"tests/parity/{tests.parity}")
    assert name in ("sft", "pretrain") or settings in parity or f'"{name}"' in parity, (
        f"tests/parity/{tests.parity} has no case of {name}"
    )
    page = text("docs/objectives.md")
    assert f"| `{name}`" in page or f", `{name}`" in page, f"docs/objectives.md has no row of {name}"
    assert any(f"objective={name}" in words for words in curves.CASES.values()) or name == "sft", (
        "tests/curves.py has no case"
    )
    assert name in rules.OBJECTIVE_NAMES, "launch/config/importers/rules.py does not know it"
    assert name in WORDS_OF_EVERY_ROOM or house_rules.OBJECTIVES.search(name), "OBJECTIVES of tests/house_rules.py"


@pytest.mark.parametrize("variant", VARIANTS)
def test_objective_reads_a_reference_if_and_only_if_its_loss_uses_it(variant):
    config = VARIANTS[variant]
    assert (REFERENCE in data_spec_of(config).marks) is build_objective(config).uses_reference


@pytest.mark.parametrize("name", list(ScheduleName))
def test_schedule_has_docs_importer_words_and_a_config_file(name):
    page = text("docs/schedules.md")
    assert f"| `schedule={name}`" in page, "docs/schedules.md says when to take it"
    assert f"\n| `{name}` |" in page, "docs/schedules.md has its factors"
    assert name in rules.SCHEDULE_NAMES, "launch/config/importers/rules.py does not know it"
    assert Path(ROOT / "conf" / "schedule" / f"{name}.yaml").exists()


def test_task_kinds_are_all_on_their_page():
    pages = text("docs/reference/evaluation-tasks.md") + text("docs/reference/people-tasks.md")
    missing = [kind for kind in TASK_KINDS if f"`{kind}`" not in pages]
    assert missing == [], "docs/reference/evaluation-tasks.md or docs/reference/people-tasks.md says it"


def test_trackers_are_all_on_their_page():
    page = text("docs/tracking.md")
    assert not [kind.setting_name for kind in trackers.TRACKER_KINDS if f"logging.{kind.setting_name}=" not in page]


def test_the_comments_of_train_yaml_list_all_choices():
    lines = re.sub(r"\|\n +# ", "| ", text("conf/train.yaml")).splitlines()
    listed = {match[1]: match[2] for line in lines if (match := re.match(r"  - (\w+): \w+ +# (.*\|.*)", line))}
    assert {"tuning", "objective", "strategy", "optim", "schedule"} <= set(listed)
    for group, choices in listed.items():
        assert set(choices.split(" | ")) == set(choices_by_group()[group]), f"conf/train.yaml: {group}"
