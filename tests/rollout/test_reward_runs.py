"""Runs with rewards from the command line: tried before they start, copied, recorded, and refused when they change."""

import json
import shutil
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest

from launch.config.compose import compose_config
from launch.evaluate.plan import _set_evaluation_defaults
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_jsonl
from trainer.config.rounds import answer_batch_problems
from trainer.reward_trial import REPORT

SIZES = (
    "batch.global=8 batch.micro=4 objective.group_size=4 objective.rollout.max_new_tokens=6 logging.wandb=disabled "
    "logging.report=false logging.every_steps=1 run.threads=1 data.eval_share=0.2 evaluation.every_steps=2 export.at_end=false"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewarded")
    model_dir(root)
    write_jsonl(root / "prompts.jsonl", [{"question": f"Question {n}?", "answer": str(n)} for n in range(20)])
    (root / "shared.py").write_text(
        "def share(text):\n    return sum(c in 'aeiou' for c in text) / max(1, len(text))\n"
    )
    (root / "rewards.py").write_text(
        "from shared import share\n\n"
        "def vowels(completions, answer):\n    return [share(text) for text in completions]\n\n"
        "def ends(completion, truncated):\n    return 0.0 if truncated else 1.0\n"
    )
    return root


def words(site, *more):
    paths = [f"model.path={site / 'llama'}", f"data.path={site / 'prompts.jsonl'}", f"data.cache_dir={site / 'cache'}"]
    return ["objective=grpo", *paths, f"objective.rewards={site / 'rewards.py'}", *SIZES.split(), *more]


def test_rewards_are_tried_before_a_run_is_started(site, capsys):
    assert command_here(["evaluate", *words(site), f"to={site / 'trial'}", "--json"]) == 0
    report = json.loads((site / "trial" / REPORT).read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["prompts"], report["draws"], report["prompts_per_round"]) == (2, 4, 2)
    assert report["rewards"].keys() == {"vowels", "ends"}
    seconds = [report["write_s"], report["reward_s"], report["train_s"]]
    assert min(seconds) > 0 and report["round_s"] == pytest.approx(sum(seconds))
    assert 0 <= report["reward"]["least"] <= report["reward"]["mean"] <= report["reward"]["most"]
    shares = report["idle_share_by_group_size"]
    assert shares["2"] >= shares["8"] >= shares["32"] >= 0
    assert report["groups"][0]["best"]["reward"] >= report["groups"][0]["worst"]["reward"]


def test_a_run_keeps_its_rewards_and_what_was_written(site, capsys):
    run = site / "run"
    train = ["train", *words(site, f"run.dir={run}", "budget.steps=3", "checkpoint.every_steps=2")]
    assert command_here(train) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/reward" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert "watch: eval/reward\n" in (run / "config.yaml").read_text()
    trained = [row for row in rows if "loss" in row]
    files = sorted(file.name for file in (run / "rounds").iterdir())
    assert files == ["round-000001.parquet", "round-000002.parquet", "round-000003.parquet"]
    for number, row in enumerate(trained, start=1):
        answers = parquet.read_table(run / "rounds" / f"round-{number:06d}.parquet").to_pylist()
        assert len(answers) == 8
        mean = sum(answer["reward"] for answer in answers) / 8
        assert row["reward"] == pytest.approx(mean)
        assert sum(answer["advantage"] for answer in answers) == pytest.approx(0, abs=1e-9)
    identity = json.loads((run / "identity.json").read_text())["rewards"]
    assert identity.keys() == {"0/rewards.py", "0/shared.py"}

    # As if it had been killed in its third step. A file that has changed since is another reward.
    shutil.rmtree(run / "checkpoints" / "step-000003")
    (run / "status.json").unlink()
    shared = (site / "shared.py").read_text()
    (site / "shared.py").write_text(shared + "\nchanged = True\n")
    capsys.readouterr()
    assert command_here(train) == 64
    assert "shared.py differs from the copy" in capsys.readouterr().err
    (site / "shared.py").write_text(shared)
    last_round = parquet.read_table(run / "rounds" / "round-000003.parquet")
    assert command_here(train) == 0
    assert parquet.read_table(run / "rounds" / "round-000003.parquet") == last_round

    capsys.readouterr()
    assert command_here(["evaluate", str(run), f"to={site / 'tuned'}"]) == 0
    assert "a round of 2 prompts: about" in capsys.readouterr().out
    report = json.loads((site / "tuned" / REPORT).read_text())
    assert report["checkpoint"] == str(run / "checkpoints" / "step-000003")

    # With the run's copies, whatever has become of the file; an export, which runs no reward, does without both.
    text = (site / "rewards.py").read_text()
    (site / "rewards.py").unlink()
    assert command_here(["evaluate", str(run)]) == 0
    assert (run / "evaluation" / "rewards" / "0" / "rewards.py").read_text() == text
    assert command_here(["export", str(run), f"to={site / 'exported'}"]) == 0
    # A run that was killed goes on with them too, by the same words.
    shutil.rmtree(run / "checkpoints" / "step-000003")
    (run / "status.json").unlink()
    assert command_here(train) == 0
    assert parquet.read_table(run / "rounds" / "round-000003.parquet") == last_round
    # Copies of a content that this user never typed are not run, whoever owns the directory.
    copy = run / "rewards" / "0" / "rewards.py"
    copy.write_text(f"open({str(site / 'ran')!r}, 'w')\n\n{text}")
    capsys.readouterr()
    assert command_here(["evaluate", str(run)]) == 64
    assert f"runs the Python code in {site / 'rewards.py'}" in capsys.readouterr().err
    (site / "rewards.py").write_text(text)
    assert command_here(["evaluate", str(run)]) == 0
    assert not (site / "ran").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            "objective.rewards.more.kind=mathz",
            "objective.rewards.more.kind=mathz: there is no such reward; did you mean maths",
        ),
        ("objective.rewards.more.weight=1", "objective.rewards.more: give one of kind"),
        ("evaluation.watch=eval/loss", "objective=grpo has no such metric"),
        ("data.format=messages", "data.format=messages: objective=grpo reads prompts"),
        ("objective.rewards=[]", "objective.rewards: not set"),
        ("objective.rewards=none.py", "cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(site, more, problem):
    with pytest.raises(ConfigError) as refused:
        compose_config(words(site, "budget.steps=1", more))
    assert problem in str(refused.value)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_run_with_rewards_is_evaluated_in_whole_groups(site, split):
    """The batch of an evaluation is its own, and none of the run's."""
    config = compose_config(words(site, "budget.steps=3", "batch.global=8")).config
    _set_evaluation_defaults(config, SimpleNamespace(settings=[], split=split))
    assert config.batch == {"global": 4, "micro": 1} and [*answer_batch_problems(config)] == []


def test_a_reward_file_that_is_not_there_is_one_problem(site, tmp_path):
    for rewards in ("none.py", f"{tmp_path / 'none.py'}"):
        with pytest.raises(ConfigError) as refused:
            compose_config(words(site, "budget.steps=1", f"objective.rewards={rewards}"))
        assert len(refused.value.problems) == 1 and "cannot be read" in refused.value.problems[0]
    # A copy of a content that this user never typed does not stand in for it.
    copies = tmp_path / "run" / "rewards" / "0"
    copies.mkdir(parents=True)
    (copies / "none.py").write_text("def mine(completions):\n    return [7.0] * len(completions)\n")
    manifest = {"functions": {"mine": {"file": "0/none.py", "function": "mine"}}, "sha256": {}}
    (tmp_path / "run" / "rewards" / "rewards.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="cannot be read"):
        compose_config(words(site, "budget.steps=1", "objective.rewards=none.py", f"run.dir={tmp_path / 'run'}"))


def test_a_held_out_prompt_that_leaves_no_room_for_an_answer_is_refused_without_training(site, capsys):
    write_jsonl(site / "held-out.jsonl", [{"question": "long " * 300, "answer": "1"}])
    held_out = f"data.eval_path={site / 'held-out.jsonl'}"
    command = ["train", *words(site, "budget.steps=1", "data.eval_share=0", held_out)]
    assert command_here([*command, "--dry-run"]) == 64
    assert "the longest prompt with an answer of 6 tokens takes" in capsys.readouterr().err


def test_a_right_answer_without_a_result_is_refused_without_training(site, capsys):
    write_jsonl(
        site / "one-bad.jsonl",
        [*({"question": "what", "answer": "#### 4"} for _ in range(5)), {"question": "why", "answer": "so"}],
    )
    command = ["train", *words(site, "budget.steps=1", "objective.rewards=[maths]")]
    assert command_here([*command, f"data.path={site / 'one-bad.jsonl'}", "--dry-run"]) == 65
    assert "one-bad.jsonl:6: the right answer 'so' has no number" in capsys.readouterr().err


def test_held_out_prompts_are_checked_with_those_of_training(site, capsys):
    """None left, as all are too long for `data.max_length`; and a column that a reward names, in the held-out file alone."""
    write_jsonl(site / "too-long.jsonl", [{"question": "long " * 300, "answer": "1"}])
    write_jsonl(site / "no-answer.jsonl", [{"question": "what"}])
    words_of_run = words(site, "budget.steps=1", "data.eval_share=0", "data.max_length=200")
    held_out = f"data.eval_path={site / 'too-long.jsonl'}"
    assert command_here(["train", *words_of_run, held_out, "--dry-run"]) == 65
    assert (
        "data.eval_path: no document of the eval split is left as a prompt (dropped: tokenise/too_long 1)"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match=r'needs the column "answer"; data\.eval_path has question; rename'):
        compose_config([*words_of_run, "objective.rewards=[maths]", f"data.eval_path={site / 'no-answer.jsonl'}"])


def test_a_column_that_is_missing_is_refused_before_anything_starts(site, tmp_path):
    (tmp_path / "rewards.py").write_text("def right(completions, result): ...\n")
    with pytest.raises(ConfigError) as refused:
        compose_config(words(site, "budget.steps=1", f"objective.rewards={tmp_path / 'rewards.py'}"))
    assert str(refused.value) == (
        'objective.rewards.right: needs the column "result"; data.path has answer, question; rename one with '
        "data.columns.result=NAME"
    )
    compose_config(
        words(site, "budget.steps=1", f"objective.rewards={tmp_path / 'rewards.py'}", "data.columns.result=answer")
    )
    with pytest.raises(ConfigError) as refused:
        compose_config(words(site, "budget.steps=1", "objective.rewards=[json_schema,maths]"))
    assert [problem.partition(";")[0] for problem in refused.value.problems] == [
        'objective.rewards.json_schema: needs the column "schema"'
    ]


def test_short_forms_of_rewards(site):
    entries = compose_config(
        words(site, "budget.steps=1", f"objective.rewards=[{site / 'rewards.py'}:ends,length,maths:sum]")
    )
    rewards = entries.config.objective.rewards
    assert {name: (reward.kind, (reward.function or "").rpartition("/")[2]) for name, reward in rewards.items()} == {
        "ends": ("", "rewards.py:ends"),
        "length": ("length", ""),
        "sum": ("maths", ""),
    }
