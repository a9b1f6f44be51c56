"""The demo of rewards: its files, its commands, and the whole of it with a tiny model, which learns nothing in one step."""

import pytest

from launch.config.compose import compose_config
from launch.demo import command, three_words
from tests.helpers.building import model_dir
from trainer.reporting.results import read_metric_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("three-words")
    model_dir(root)
    return root / "llama"


def functions_of(source):
    namespace = {}
    exec(source, namespace)
    return namespace


def test_the_rewards_score_words_and_only_one_of_them_can_be_cheated():
    answers = [
        "The Green Garden",
        "Green garden",
        "one two three four five six seven",
        "Luminescent wildernesses beyond",
    ]
    was_cut = [False, False, True, True]
    honest = functions_of(three_words.REWARD_SOURCE)["three_words"](answers, was_cut)
    assert honest == pytest.approx([1, 2 / 3, 0, 0])
    cheatable = functions_of(three_words.CHEATABLE_REWARD_SOURCE)
    assert cheatable["three_words"](answers) == pytest.approx([1, 2 / 3, 0, 1])
    assert cheatable["ended"](answers, was_cut) == [1, 1, 0, 0]


def test_both_commands_are_legal_runs_on_prompts_of_their_own(model, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    assert not set(three_words.TRAINED_SUBJECTS) & set(three_words.HELD_OUT_SUBJECTS)
    files = three_words.write_demo_files(tmp_path)
    weights = {}
    for cheatable in (False, True):
        words = three_words.training_arguments(model, files, tmp_path / "run", cheatable=cheatable)
        config = compose_config(words).config
        assert config.batch["global"] == three_words.PROMPTS_PER_STEP * config.objective.group_size
        assert config.tuning.rank == 16 and config.tuning.targets == "all-linear"
        weights[cheatable] = [reward.weight for reward in config.objective.rewards.values()]
    assert weights[True] == [1.0, 0.0]


def test_the_demo_shows_everything_and_fails_if_nothing_was_learned(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(three_words, "fetch_demo_model", lambda: model)
    typed = ["objective=grpo", "strategy=single", "launcher.processes=1", "batch.micro=64", "budget.steps=1"]
    typed += ["optim.lr=1e-9", "run.threads=1", "logging.wandb=disabled", "logging.report=false", "run.dir=runs/tiny"]
    assert command.main([*typed, "--dry-run"]) == 0 and "(--dry-run)" in capsys.readouterr().out
    with pytest.raises(three_words.NothingLearned, match=r"eval/reward went from .* it should rise by 0.25") as failed:
        command.main(typed)
    assert failed.value.exit_code == 69
    printed = capsys.readouterr().out
    assert "def three_words(completions, truncated):" in printed, "the reward is printed"
    assert printed.count("base model:") == printed.count("tuned model:") == three_words.NUM_SHOWN_PROMPTS
    trained = next(row for row in read_metric_rows(tmp_path / "runs" / "tiny") if "reward" in row)
    assert f"by step: 1: {trained['reward']:.2f}\n" in printed
    assert "prompts: the model writes the answers to learn from while it trains" in printed
    assert "; at most " in printed and "supervised" not in printed
    assert "run.dir=runs/tiny-cheatable" in printed.splitlines()[-1]


def test_a_rise_as_large_as_stated_is_enough():
    three_words.refuse_small_rise(0.0, three_words.MIN_RISE)
    with pytest.raises(three_words.NothingLearned):
        three_words.refuse_small_rise(0.5, 0.7)
