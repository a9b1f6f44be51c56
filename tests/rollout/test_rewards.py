"""Rewards in worker processes: the three conventions, what fails, hangs and crashes, and the built-in kinds beside the tasks."""

import os
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, num_usable_cores
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import TaskCase
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.objectives.rollouts import RewardEntry, RoundsConfig
from trainer.rollout.metrics import round_metrics
from trainer.rollout.record import RoundRecord
from trainer.rollout.rewards.kinds import BUILT_IN_REWARDS, kind_problems
from trainer.rollout.rewards.process import Call, _RoundOfCalls, worker_environment
from trainer.rollout.rewards.scorer import WorkerScorer, default_num_workers, weighted_reward_sum
from trainer.rollout.round import Round
from trainer.rollout.round_table import round_table
from trainer.rollout.types import Answer, AnswerGroup, Prompt

REWARDS = """
import asyncio, os, signal, sys, threading, time
from helpers_of_mine import shared

def trl(prompts, completions, completion_ids, answer, truncated, step, log_metric, **columns):
    assert threading.current_thread() is threading.main_thread()
    signal.alarm(100); signal.alarm(0)
    log_metric("seen", len(completions))
    assert len(prompts) == len(answer) == len(truncated) == len(completion_ids) == len(columns["level"])
    return [None if cut else float(text == right) + step for text, right, cut in zip(completions, answer, truncated)]

async def verifiers(completion, answer, prompt, level=None):
    await asyncio.sleep(0)
    return float(completion == answer) + shared(level)

def verl(solution_str, ground_truth, data_source="none", extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 1.0}

def environment(completions):
    print("x" * 1000)
    names = [name for name in os.environ if name in ("RANK",) or name.startswith(("MASTER_", "SLURM_"))]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    fine = not names and not blocked and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return [float(fine and os.environ["OMP_NUM_THREADS"] == "1" and "torch" not in sys.modules)] * len(completions)

def hangs(completion):
    if completion == "hang":
        while True:
            time.sleep(0.01)
    return 1.0

def crashes_once(completion, answer):
    flag = os.path.join(os.path.dirname(__file__), "crashed")
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0

def crashes(completion):
    os.kill(os.getpid(), signal.SIGSEGV)

def fails(completions):
    deep = {}
    return deep["missing"]

def text(completions):
    return ["1.0"] * len(completions)

def nan(completion):
    return float("nan")

def short(completions):
    return [1.0]

def leaves(completion):
    raise SystemExit(3)

def extracts(completions, log_extra):
    log_extra("upper", [text.upper() for text in completions])
    log_extra("chars", [len(text) if text != "cut" else None for text in completions])
    log_extra("mixed", [1, "two", {"three": 3}][: len(completions)])
    return [0.0] * len(completions)

def extracts_one(completion, log_extra):
    log_extra("first", [completion[:1]])
    return 1.0

def extracts_too_few(completions, log_extra):
    log_extra("upper", ["a"])
    return [0.0] * len(completions)

def floods(completions):
    for _ in range(3000):
        print("y" * 10000)
    return [0.5] * len(completions)
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "helpers_of_mine.py").write_text("def shared(level):\n    return 0.25 if level is None else 0.5\n")
    file = directory / "rewards.py"
    file.write_text(textwrap.dedent(REWARDS))
    return file


def group(texts, columns=None, prompt="question", place=0):
    answers = []
    for draw, written in enumerate(texts):
        answers.append(Answer(draw, [1, 2, 3], np.zeros(3, np.float32), written, has_ended=written != "cut"))
    return AnswerGroup(Prompt(place, [1], prompt, columns or {}, f"data.jsonl:{place + 1}"), answers)


def scorer_of(rewards, tmp_path, **options):
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"), None)
    config = RoundsConfig(rewards=rewards, reward_workers=options.pop("workers", 1))
    return WorkerScorer(config, runtime, tmp_path, **options)


def functions(file, *names, **settings):
    return {name: RewardEntry(function=f"{file}:{name}", **settings) for name in names}


@pytest.fixture
def score(reward_file, tmp_path):
    """Scores groups by functions of the file, in a scorer that is closed at the end."""
    opened = []

    def run(names, groups, step=0, **settings):
        scorer = scorer_of(functions(reward_file, *names, **settings), tmp_path)
        opened.append(scorer)
        scorer.start()
        return scorer.score(groups, step=step)

    yield run
    for scorer in opened:
        scorer.close()


def test_functions_of_three_conventions_score_alike(score, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "7")
    columns = {"answer": "right", "ground_truth": "right", "level": 3}
    groups = [group(["right", "wrong", "cut"], columns), group(["right"], columns | {"level": None}, place=1)]
    first, second = score(["trl", "verifiers", "verl", "environment"], groups, step=2)
    np.testing.assert_equal(first.scores_by_reward["trl"], [3.0, 2.0, np.nan])
    np.testing.assert_equal(first.scores_by_reward["verifiers"], [1.5, 0.5, 0.5])
    np.testing.assert_equal(first.scores_by_reward["verl"], [1.0, 0.0, 0.0])
    np.testing.assert_equal(first.scores_by_reward["environment"], [1.0, 1.0, 1.0])
    np.testing.assert_equal(first.total, [6.5, 3.5, 1.5])
    assert first.logged_numbers == {"trl/seen": [3.0], "verl/acc": [1.0, 1.0, 1.0]}
    np.testing.assert_equal(second.scores_by_reward["verifiers"], [1.25])
    assert first.extra_columns == {"verl/acc": [1.0, 1.0, 1.0]}


def test_columns_that_functions_give_are_in_the_record_and_the_metrics(score, tmp_path):
    groups = [group(["right", "wrong", "cut"]), group(["cut", "cut", "a"], place=1)]
    scores = score(["extracts", "extracts_one"], groups)
    assert scores[0].extra_columns["extracts/upper"] == ["RIGHT", "WRONG", "CUT"]
    assert scores[0].extra_columns["extracts_one/first"] == ["r", "w", "c"]
    metrics = round_metrics(groups, scores, np.zeros(2, bool))
    assert metrics["extra/extracts/chars"] == pytest.approx(11 / 3)
    assert metrics["extra/extracts/mixed"] == 1 and "extra/extracts/upper" not in metrics
    made = Round(0, 2, groups, scores, np.zeros((2, 3)), np.ones((2, 3), bool))
    RoundRecord(tmp_path).write(made, 4)
    rows = parquet.read_table(tmp_path / "rounds" / "round-000005.parquet").to_pylist()
    assert [row["extra/extracts/chars"] for row in rows] == [5.0, 5.0, None, None, None, 1.0]
    assert [row["extra/extracts/mixed"] for row in rows][:3] == ["1", "two", "{'three': 3}"]
    assert "extra/extracts/upper" in round_table(made, 5).columns
    assert [row[2] for row in round_table(made, 5).rows] == ["best", "", "worst"] * 2


def test_only_answer_of_a_group_is_called_the_best(score):
    groups = [group(["right"]), group(["a"], place=1)]
    scores = score(["extracts"], groups)
    alone = Round(0, 2, groups, scores, np.zeros((2, 1)), np.ones((2, 1), bool))
    assert [row[2] for row in round_table(alone, 5).rows] == ["best", "best"]


def test_several_workers_share_the_calls_of_a_rank(reward_file, tmp_path):
    scorer = scorer_of(functions(reward_file, "trl", "verifiers"), tmp_path, workers=2)
    groups = [group(["right", "wrong"], {"answer": "right", "level": None}, place=place) for place in range(5)]
    scores = scorer.score(groups, step=0)
    scorer.close()
    assert [of_group.total.tolist() for of_group in scores] == [[2.25, 0.25]] * 5
    assert len([*(tmp_path / "logs").glob("rewards-rank-0-*.log")]) == 2
    runtime = Runtime(0, 8, 0, 8, torch.device("cpu"), None)
    assert default_num_workers(runtime) == max(1, min(4, num_usable_cores() // 8))


def test_answers_are_messages_where_prompts_are(reward_file, tmp_path):
    file = tmp_path / "chat.py"
    file.write_text(
        "def last(prompts, completions):\n"
        "    return [float(len(c[0]['content']) + len(p)) for p, c in zip(prompts, completions)]\n"
    )
    scorer = scorer_of(functions(file, "last"), tmp_path)
    (scores,) = scorer.score([group(["ab"], prompt=[{"role": "user", "content": "q"}])], step=0)
    scorer.close()
    np.testing.assert_equal(scores.total, [3.0])


def test_a_call_that_takes_too_long_is_killed_and_counted(score):
    groups = [group(["fine", "hang", "fine"]), group(["fine"], place=1)]
    first, second = score(["hangs"], groups, timeout_s=1.5)
    np.testing.assert_equal(first.total, [1.0, np.nan, 1.0])
    np.testing.assert_equal(second.total, [1.0])
    assert (first.num_timed_out, second.num_timed_out) == (1, 0)


def test_a_reward_that_is_never_in_time_ends_the_run_however_few_calls_a_round_has():
    """A round has two calls here. One answer in time, and only eight calls of a round that all take too long end it."""
    calls = [Call("hangs", {}, f"data.jsonl:{row}", 1.0) for row in range(2)]
    never_in_time = Counter({"hangs": 0})
    for _ in range(3):
        for number in range(2):
            _RoundOfCalls(calls, never_in_time).give_up_call(number)
    recovering = Counter(never_in_time)
    last = _RoundOfCalls(calls, never_in_time)
    last.give_up_call(0)
    with pytest.raises(
        DataError, match=r"hangs: 8 calls took longer than timeout_s=1, .* \(the last one: data.jsonl:1\)"
    ):
        last.give_up_call(1)
    _RoundOfCalls(calls, recovering).keep_reply(0, {"scores": [1.0], "logged": {}, "extra": {}})
    for _ in range(10):
        _RoundOfCalls(calls, recovering).give_up_call(0)


def test_a_process_that_crashes_is_tried_once_more(score):
    (scores,) = score(["crashes_once"], [group(["a", "b"], {"answer": "a"})])
    np.testing.assert_equal(scores.total, [1.0, 1.0])
    with pytest.raises(DataError, match=r"objective.rewards.crashes: failed twice .*data.jsonl:1\): .*SIGSEGV.*-0.log"):
        score(["crashes"], [group(["a"])])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (
            "fails",
            r"(?s)objective.rewards.fails: raised an exception \(data.jsonl:1\).*rewards.py\", line \d+.*KeyError: 'missing'",
        ),
        ("text", "'1.0' as a score; it must be a finite number"),
        ("nan", "returned nan as a score"),
        ("short", "returned 1 scores for 2 answers"),
        (
            "extracts_too_few",
            r"called log_extra\('upper', \['a'\]\); it takes a list with a value for each of 2 answers \(data.jsonl:1\)",
        ),
        ("leaves", r"(?s)raised an exception.*SystemExit: 3"),
    ],
)
def test_what_is_no_score_ends_the_run_with_file_and_row(score, name, pattern):
    with pytest.raises(DataError, match=pattern):
        score([name], [group(["a", "b"])])


def test_a_file_that_cannot_be_imported_ends_the_run_before_anything(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\n\ndef mine(completions):\n    return []\n")
    scorer = scorer_of(functions(file, "mine"), tmp_path)
    with pytest.raises(DataError, match=r"(?s)objective.rewards.mine: cannot be loaded.*no_such_module"):
        scorer.start()


def test_a_flood_of_prints_is_cut(score, tmp_path):
    (scores,) = score(["floods"], [group(["a"])])
    np.testing.assert_equal(scores.total, [0.5])
    (log,) = (tmp_path / "logs").glob("rewards-*.log")
    assert log.stat().st_size < 5 << 20


def test_a_run_that_is_asked_to_stop_does_not_wait(reward_file, tmp_path):
    stop = []
    # One that waited for the reward would meet this test's own limit first.
    scorer = scorer_of(functions(reward_file, "hangs", timeout_s=3600), tmp_path, stop_asked=lambda: bool(stop))
    scorer.start()
    stop.append(True)
    with pytest.raises(Interrupted):
        scorer.score([group(["hang"])], step=0)


class StandInJudge:
    """Grades by the number in the answer; says nothing of others."""

    def collect_verdicts(self, questions):
        answers = [question.partition("<answer>\n")[2].partition("\n</answer>")[0] for question in questions]
        self.asked = questions
        return [f"Grade: {answer}" if answer.isdigit() else "I cannot say." for answer in answers]


def test_a_judge_gives_grades_beside_functions(reward_file, tmp_path):
    judge = StandInJudge()
    rewards = functions(reward_file, "hangs", timeout_s=1.5) | {"judge": RewardEntry(kind="judge", weight=2.0)}
    scorer = scorer_of(rewards, tmp_path, judge=judge)
    (scores,) = scorer.score([group(["10", "1", "none", "hang"], {"answer": "the right one"})], step=0)
    scorer.close()
    np.testing.assert_equal(scores.scores_by_reward["judge"], [1.0, 0.0, np.nan, np.nan])
    np.testing.assert_equal(scores.total, [3.0, 1.0, 1.0, np.nan])
    assert "<reference>\nthe right one\n</reference>" in judge.asked[0]
    alone = scorer_of({"judge": RewardEntry(kind="judge")}, tmp_path, judge=judge)
    alone.start()
    (scores,) = alone.score([group(["4", "none"])], step=0)
    np.testing.assert_equal(scores.total, [1 / 3, np.nan])
    assert "<reference>" not in judge.asked[0]


def test_workers_are_no_ranks():
    environment = worker_environment(
        {"RANK": "1", "SLURM_JOB_ID": "2", "MASTER_ADDR": "a", "HOME": "/h", "PYTHONPATH": "/p"}
    )
    assert {"RANK", "SLURM_JOB_ID", "MASTER_ADDR"}.isdisjoint(environment)
    assert environment["HOME"] == "/h"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["PYTHONPATH"].split(os.pathsep)[1] == "/p"
    assert Path(environment["PYTHONPATH"].split(os.pathsep)[0], "trainer").is_dir()


def test_totals_leave_out_what_does_not_apply():
    by_reward = {
        "a": np.array([1.0, np.nan, np.nan, 2.0]),
        "b": np.array([4.0, 4.0, np.nan, 4.0]),
        "c": np.full(4, 9.0),
    }
    np.testing.assert_equal(weighted_reward_sum(by_reward, {"a": 2.0, "b": -1.0, "c": 0.0}), [-2.0, -4.0, np.nan, 0.0])


ANSWERS = [
    "It is 42.",
    "42",
    "\\boxed{84/2}",
    "#### 41",
    "forty two",
    "the 42",
    '{"a": 1}',
    '```json\n{"a": 2}\n```',
    '{"a": "x"}',
]


@pytest.mark.parametrize(("kind", "score"), [("exact_match", "match"), ("f1", "f1"), ("maths", "right")])
def test_built_in_rewards_are_the_tasks_of_evaluations(kind, score):
    task = TASK_KINDS[kind](kind, TaskConfig(kind=kind, path="-"))
    reward = BUILT_IN_REWARDS[kind]({})
    case = TaskCase("", fields={"references": ["The 42"], "result": 42})
    for answer in ANSWERS:
        assert reward.score(answer, 1, {"answer": "The 42"}) == task.score(case, answer)[score]
    assert {reward.score(answer, 1, {"answer": "The 42"}) for answer in ANSWERS} >= {0.0, 1.0}


def test_built_in_rewards_of_form():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    json_reward = BUILT_IN_REWARDS["json_schema"]({})
    assert [json_reward.score(answer, 1, {"schema": schema}) for answer in ANSWERS[-4:]] == [0.0, 1.0, 1.0, 0.0]
    length = BUILT_IN_REWARDS["length"]({"limit": 10, "buffer": 4})
    assert [length.score("", tokens, {}) for tokens in (1, 6, 8, 10, 12)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    form = BUILT_IN_REWARDS["format"]({"pattern": "<think>.*</think>.+"})
    assert [form.score(text, 1, {}) for text in ("<think>a\nb</think> c\n", "<think>a</think>", "a")] == [1.0, 0.0, 0.0]
    calls = BUILT_IN_REWARDS["tool_calls"]({})
    reference = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    ]
    written = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert [calls.score(text, 1, {"messages": reference}) for text in (written, "add")] == [1.0, 0.0]


def test_math_verify_compares_results_in_latex():
    pytest.importorskip("math_verify")
    reward = BUILT_IN_REWARDS["math_verify"]({})
    answers = {"1/2": r"It is $\frac{2}{4}$.", "$x^2+1$": "$1+x^2$", "#### 42": r"so \boxed{42}", "(1,2)": "$(1, 2)$"}
    assert all(reward.score(answer, 1, {"answer": reference}) == 1 for reference, answer in answers.items())
    assert reward.score("41", 1, {"answer": "42"}) == 0


@pytest.mark.parametrize(
    ("kind", "options", "pattern"),
    [
        ("math", {}, "did you mean maths"),
        ("maths", {"tolerance": 1}, "options.tolerance: maths has no such option; it has reference"),
        ("format", {}, "options.pattern: not set"),
        ("format", {"pattern": "("}, "is no regular expression"),
        ("length", {"limit": 0}, "must be a number of tokens above 0"),
        ("json_schema", {"schema": "/no/such"}, "no such file"),
        ("json_schema", {"schema": __file__}, "the schema is no JSON"),
        ("exact_match", {"normalise": "all"}, "options.normalise=all"),
    ],
)
def test_wrong_options_of_kinds_are_told(kind, options, pattern):
    import re

    (problem,) = kind_problems(kind, options, "objective.rewards.mine")
    assert problem.startswith("objective.rewards.mine.")
    assert re.search(pattern, problem), problem
