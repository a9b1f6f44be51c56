"""Every shipped YAML composes, and its comments tell the truth about keys and defaults."""

import dataclasses
import enum
import re
import runpy
from importlib.util import find_spec

import pytest
import yaml

from launch.config.choices import (
    CONF_DIR,
    MODEL_GROUP,
    SETTINGS_BORROWED_FROM_CHOICE,
    choices_by_group,
    settings_class_of,
    settings_classes_by_group,
)
from launch.config.compose import compose_config
from tests.helpers.recipes import RECIPE_NAMES, chosen_names
from trainer.config import run as run_config
from trainer.model.known_shapes import names_by_hub_id
from trainer.objectives.registry import FAMILIES
from trainer.optim.config import OptimName
from trainer.optim.schedule import SCHEDULES_BY_SETTING, ScheduleName
from trainer.optim.support import OPTIMIZER_SUPPORT

LEFT_OUT = RECIPE_NAMES - chosen_names()
EXPERIMENTS = [name for name in choices_by_group()["experiment"] if name not in LEFT_OUT]
"""Those written by hand, and recipes of the table with every task, method and strategy; `make test-all` takes all."""
TYPED = {field.name: field.default_factory for field in dataclasses.fields(run_config.RunConfig)}
CHOICES = [
    (g, c)
    for g, names in choices_by_group().items()
    for c in names
    if g not in ("experiment", "local", MODEL_GROUP) or (g, c) == (MODEL_GROUP, "default")
]
PRESETS = [("data", "audited"), ("data", "gdpr"), ("data", "hipaa")]  # name what differs from `default` only
NEEDS = {
    "tuning=freeze": ["tuning.layers=last-2"],
    "tuning=peft": ["tuning.type=hra", "optim.lr=1e-3"],
}  # have no default that runs
NEEDS |= {
    f"objective={choice}": ["objective.rewards=[maths]"]
    for choice in ("grpo", *SETTINGS_BORROWED_FROM_CHOICE["objective"])
}
PARTIAL = {  # keys that mean nothing under a choice, and are not shown there
    **{
        f"schedule/{schedule}": {name for name, schedules in SCHEDULES_BY_SETTING.items() if schedule not in schedules}
        for schedule in ScheduleName
    },
    "strategy/zero1": {"offload_parameters", "persistence_threshold", "prefetch_mib"},
    "strategy/zero2": {"offload_parameters", "persistence_threshold", "prefetch_mib"},
    "launcher/slurm": {"rdzv", "node_rank", "address", "hosts", "ssh"},
}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", "only for this test")
    (tmp_path / "train.jsonl").write_text('{"answer": "what rewards compare with"}\n')
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_legal_run(name):
    tree = yaml.safe_load((CONF_DIR / "experiment" / f"{name}.yaml").read_text())
    # Rows, experts and replicas can be shared by as many ranks as there are: the GPUs of the machine that the file names.
    degree = 2 if {"override /strategy": "hsdp"} in tree["defaults"] else 1
    degree = max([degree, *tree.get("parallel", {}).values()])
    ranks = [f"launcher.processes={degree}"] if degree > 1 else []
    config = compose_config([f"experiment={name}", "data.path=train.jsonl", *ranks]).config
    assert config.model.path in names_by_hub_id(), "plans need no files of it"
    # A number of ranks would leave GPUs idle on a larger node; with strategy=single it is one process anyway.
    assert "launcher" not in tree


@pytest.mark.parametrize("name", choices_by_group()["experiment"])
def test_experiment_file_says_how_it_is_run(name):
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert f"shardtune train experiment={name} " in text
    for word in ("# Hardware: ", "# Expect: "):
        assert word in text


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_config_choice_composes_to_its_own_settings(group, choice):
    words = [f"{group}={choice}", "model.path=m", "data.path=train.jsonl", "budget.steps=1", "batch.global=32"]
    if choice == "distillation":
        words.append("objective.teacher.path=m")
    if group == "optim":
        words.append("schedule=constant")  # the only one under which schedule-free is legal
        package = OPTIMIZER_SUPPORT[OptimName(choice)].package
        if package is not None and find_spec(package) is None:
            pytest.skip(f"needs {package}")
    words += NEEDS.get(f"{group}={choice}", [])
    if group != "debug":
        words += [f"launcher.processes={1 if choice in ('single',) or group != 'strategy' else 2}"]
    config = compose_config([*words, *(["strategy=fsdp2"] if choice == "cpu2" else [])]).config
    if group in settings_classes_by_group():
        assert type(getattr(config, group)) is settings_class_of(group, choice)
    if group in (*settings_classes_by_group(), "schedule", "optim"):
        is_recipe = choice in SETTINGS_BORROWED_FROM_CHOICE.get(group, {}) and group == "objective"
        named = getattr(config, group).recipe if is_recipe else getattr(config, group).name
        assert str(named) == choice


def test_config_choices_are_the_names_of_the_settings():
    for group, names in (
        ("strategy", run_config.StrategyConfig().name),
        ("tuning", run_config.TuningConfig().name),
        ("schedule", run_config.ScheduleConfig().name),
        ("launcher", run_config.LauncherConfig().name),
        ("optim", run_config.OptimConfig().name),
    ):
        assert choices_by_group()[group] == sorted(member.value for member in type(names))
    assert choices_by_group()["objective"] == sorted([*FAMILIES, *SETTINGS_BORROWED_FROM_CHOICE["objective"]])


def plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    return value


def settings_behind(group, choice):
    if group in settings_classes_by_group():
        return settings_class_of(group, choice)()
    return TYPED[group]()


def defaults_of(settings, prefix=""):
    """Every leaf below `settings` with its default, by dotted name; of a table of settings, its name alone."""
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= defaults_of(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = plain(value)
    return found


def shown_in(text):
    """The commented keys of a file by dotted name, the nesting read from the indentation."""
    found, above = {}, []
    for spaces, key, value in re.findall(r"^# ( *)(\w+):(?: (.+))?$", text, re.MULTILINE):
        above = [*above[: len(spaces) // 2], key]
        if value:
            found[".".join(above)] = value
    return found


REFERENCE = runpy.run_path(str(CONF_DIR.parent / "docs" / "make_reference.py"))
CONF_FILES = REFERENCE["conf_files"]()
FILES = [c for c in CHOICES if c[0] != "debug" and c[1] != "none" and c not in PRESETS]


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_config_key_is_shown_in_its_group_file_with_its_default(group, choice):
    text = (CONF_DIR / group / f"{choice}.yaml").read_text()
    set_here = yaml.safe_load(text) or {}
    shown = shown_in(text)
    defaults = defaults_of(settings_behind(group, choice))
    keys = defaults.keys() - {"name"} - PARTIAL.get(f"{group}/{choice}", set())
    assert keys <= shown.keys() | set_here.keys()
    for key in keys & shown.keys() - set_here.keys():
        assert yaml.safe_load(shown[key]) == defaults[key], f"{group}/{choice}.yaml: {key}"


@pytest.mark.parametrize(("group", "choice"), PRESETS)
def test_preset_sets_existing_keys_and_says_what_it_is_for(group, choice):
    text = (CONF_DIR / group / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text).keys() - {"defaults"} <= {f.name for f in dataclasses.fields(TYPED[group]())}


@pytest.mark.parametrize("file", CONF_FILES, ids=lambda file: file.relative_to(CONF_DIR).as_posix())
def test_config_comments_are_those_of_the_fields(file):
    written = file.read_text(encoding="utf-8")
    assert REFERENCE["commented"](written, CONF_FILES[file]) == written, "run: python docs/make_reference.py"


@pytest.mark.parametrize("part", ["run", "budget", "profile", "guards", "checkpoint", "export"])
def test_the_root_shows_every_key_of_the_run(part):
    section = (CONF_DIR / "train.yaml").read_text().split(f"\n# {part}:\n")[1].split("\n# ----")[0]
    shown = dict(re.findall(r"^  # (\w+): (.+)$", section, re.MULTILINE))
    settings = TYPED[part]()
    for field in dataclasses.fields(settings):
        assert yaml.safe_load(shown[field.name]) == plain(getattr(settings, field.name)), field.name


def test_a_local_file_is_optional_and_not_under_version_control():
    ignored = (CONF_DIR.parent / ".gitignore").read_text()
    assert "conf/local/*" in ignored
    assert (CONF_DIR / "local" / "README.md").exists()


def test_no_shipped_file_depends_on_the_time():
    assert not [path for path in CONF_DIR.rglob("*.yaml") if "${now" in path.read_text()]
