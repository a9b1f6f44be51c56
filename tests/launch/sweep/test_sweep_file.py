"""`train -m sweeper=wandb`: a file that W&B reads as the search that was typed, and whose trials are legal commands."""

import runpy
from pathlib import Path

import pytest
import yaml

from launch.config.compose import compose_config
from launch.main import main
from launch.sweep.space import split_searched_settings
from launch.sweep.sweeper import plan_search
from launch.sweep.wandb_sweep_file import wandb_sweep_config, wandb_sweep_parameter
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data

SPACE = ["optim.lr=tag(log,interval(1e-5,1e-3))", "tuning.rank=choice(8,16)", "optim.weight_decay=interval(0.0,0.5)"]
SPACE += ["run.seed=interval(1,9)", "tuning.targets=[q_proj],[v_proj,k_proj]"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    data = write_chat_data(path / "train.jsonl", 8)
    shared = [f"model.path={model_dir(path)}", f"data.path={data}", f"data.eval_path={data}", "tuning=lora"]
    return [*shared, "strategy=single", "budget.steps=4", f"run.dir={path / 'search'}", "sweeper=wandb"]


def test_wandb_reads_the_space_that_was_typed(words):
    """By its own reader of sweeps, which makes Optuna's distributions of them, as ours are."""
    pytest.importorskip("optuna")
    from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config

    search = plan_search([*words, *SPACE])
    theirs = search_space_from_sweep_config(wandb_sweep_config(search)["parameters"])
    numbers = {one.key: one.distribution() for one in search.searched_settings if not one.choices}
    assert {key: theirs[key] for key in numbers} == numbers and len(numbers) == 3
    assert theirs["tuning.rank"].choices == (8, 16)
    assert theirs["tuning.targets"].choices == ("[q_proj]", "[v_proj,k_proj]")
    assert wandb_sweep_config(search)["metric"] == {"name": "eval/loss", "goal": "minimize"}


def test_wandb_sweep_agent_starts_commands_that_compose(words, capsys):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    assert main(["train", "-m", *words, *SPACE, "sweeper.trials=7"]) == 0
    said = capsys.readouterr().out
    path = said.splitlines()[0].removeprefix("written: ")
    assert f"wandb sweep {path}" in said and f"python {Path(path).with_name('workspace.py')}" in said
    with Path(path).open() as file:
        sweep = yaml.safe_load(file)
    assert sweep["run_cap"] == 7
    drawn = {"optim.lr": 1.2345678e-05, "tuning.rank": 16, "optim.weight_decay": 0.25, "run.seed": 3}
    drawn["tuning.targets"] = "[v_proj,k_proj]"
    command = create_sweep_command(sweep["command"])
    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in drawn.items()}})
    assert command[:3] == ["${env}", "shardtune", "train"] and command[-1] == "${args_no_hyphens}"
    config = compose_config([*command[3:-1], *made["args_no_hyphens"]]).config
    assert (config.optim.lr, config.tuning.rank, config.run.seed) == (1.2345678e-05, 16, 3)
    assert config.tuning.targets == ["v_proj", "k_proj"] and config.optim.weight_decay == 0.25
    assert config.run.dir is None and str(config.logging.wandb) == "online"
    # The view finds the trials by the group that their command gives them.
    workspace = runpy.run_path(str(Path(path).with_name("workspace.py")))
    (group,) = workspace["FILTERS"]
    assert config.logging.group == "search" and str(group) == str(workspace["ws"].Metric("Group").isin(["search"]))
    assert workspace["COLUMNS"] == [
        "lr",
        "config.tuning.rank",
        "config.optim.weight_decay",
        "seed",
        "config.tuning.targets",
    ]
    assert (
        workspace["GROUP_BY"] == ["config.tuning.rank", "config.tuning.targets"]
        and workspace["FINAL"] == "final/eval/loss"
    )
    view = workspace["workspace"]("team")
    assert [section.name for section in view.sections][:2] == ["Points", "Which settings are best?"]


def test_wandb_sweep_dry_run_prints_the_file_and_refuses_what_wandb_lacks(words, capsys):
    assert main(["train", "-m", *words, *SPACE[:1], "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"] == "bayes"
    with pytest.raises(ConfigError) as caught:
        wandb_sweep_config(
            plan_search([*words, *SPACE[:1], "sweeper.prune=median", "sweeper.seed=3", "evaluation.every_steps=1"])
        )
    assert [line.partition(":")[0] for line in caught.value.problems] == ["sweeper.prune=median", "sweeper.seed=3"]
    with pytest.raises(ConfigError, match="sweeper=wandb: no setting has several values"):
        plan_search(words)


def test_ranges_are_listed_from_their_lower_end():
    (steps, many), _ = split_searched_settings(["optim.warmup=range(1,9,3)", "optim.x=range(0,90000,3)"])
    assert wandb_sweep_parameter(steps) == {"values": [1, 4, 7]}
    with pytest.raises(ConfigError, match=r"has 30,000 values; write interval\("):
        wandb_sweep_parameter(many)
