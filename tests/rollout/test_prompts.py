"""Rows of prompts with the columns that rewards read, from the file to the prepared data; and what composing finds wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, RejectedRow, SourceRow
from trainer.data.fields import KeptColumns
from trainer.data.formats import RowReader
from trainer.data.store.documents import DOCUMENTS_FILE, document_schema, to_record_batch
from trainer.objectives.answers import PromptDataSpec
from trainer.objectives.reward_functions import (
    columns_read_by_rewards,
    reward_function_problems,
    reward_functions_in_file,
)
from trainer.objectives.rollouts import RewardEntry, RoundsConfig
from trainer.rollout.rewards.copies import (
    copy_rewards,
    function_locations,
    imported_files,
    renew_copies,
    reward_source_digests,
)
from trainer.rollout.rewards.row_check import check_reward_rows

SOURCE = """
import json
import words
from package.inner import thing
from .relative import nothing

def right(completions, answer, level=1, **kwargs): ...
def brief(completion, *, limit, prompt): ...
async def scored(data_source, solution_str, ground_truth, extra_info=None): ...
def needs_state(completion, state): ...
def helper(text): ...
def _hidden(completions): ...
"""


@pytest.fixture
def reward_file(tmp_path):
    (tmp_path / "words.py").write_text("import more\n")
    (tmp_path / "more.py").write_text("import words\n")
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text("")
    file = tmp_path / "rewards.py"
    file.write_text(SOURCE)
    return file


def read(fields, kept=None, columns=None):
    return RowReader(DataFormat.prompt, columns or {}, source="data", kept=kept)(SourceRow("f.jsonl", 3, fields))


USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}


def test_prompts_are_what_stands_before_the_answer():
    kept = KeptColumns(required=("answer",), optional=("completion", "level"))
    document = read({"question": "2+2?", "answer": "4", "id": 7}, kept)
    assert (document.prompt, document.completion, document.columns) == ("2+2?", None, {"answer": "4"})
    assert document.conversation() == [{"role": "user", "content": "2+2?"}]
    document = read({"messages": [USER, REPLY, USER, REPLY], "answer": 4, "level": None}, kept)
    assert [turn["role"] for turn in document.messages] == ["user", "assistant", "user"]
    assert document.columns == {"answer": 4, "completion": "a"}
    verl = {"prompt": [USER], "reward_model": {"ground_truth": "5", "style": "rule"}, "data_source": "gsm8k"}
    assert read(verl, KeptColumns(("ground_truth", "data_source"))).columns == {
        "ground_truth": "5",
        "data_source": "gsm8k",
    }
    assert read({"prompt": "p", "a": 1, "b": None}, KeptColumns(keeps_all=True)).columns == {"prompt": "p", "a": 1}


def test_fingerprints_keep_the_names_of_earlier_versions():
    """With other names, prompts that an earlier version prepared are not found again."""
    kept = KeptColumns(required=("answer",), optional=("level",), keeps_all=True)
    assert PromptDataSpec(kept).identity() == {"kept": {"required": ("answer",), "optional": ("level",), "all": True}}


def test_rows_without_what_a_reward_needs_are_bad_rows():
    rejected = read({"prompt": "p", "solution": "4"}, KeptColumns(required=("answer",)))
    assert isinstance(rejected, RejectedRow)
    assert "no column 'answer', which a reward needs" in rejected.message
    renamed = read({"prompt": "p", "solution": "4"}, KeptColumns(required=("answer",)), {"answer": "solution"})
    assert isinstance(renamed, Document)
    assert renamed.columns == {"answer": "4"}
    with pytest.raises(ConfigError, match="no column that format=prompt reads"):
        read({"prompt": "p"}, KeptColumns(), {"answr": "solution"})
    assert read({"messages": [REPLY]}).reason == "no_prompt"


def test_kept_columns_are_json_in_the_table():
    document = Document("f.jsonl", 1, prompt="p", columns={"answer": ["4", 4.5, {"deep": None}]})
    row = to_record_batch([document]).to_pylist()[0]
    assert json.loads(row["columns"]) == document.columns


def test_signatures_are_read_without_running_the_file(reward_file):
    functions = reward_functions_in_file(reward_file)
    assert {name: function.convention.name for name, function in functions.items()} == {
        "right": "trl",
        "brief": "verifiers",
        "scored": "verl",
        "needs_state": "verifiers",
    }
    rewards = {name: RewardEntry(function=f"{reward_file}:{name}") for name in ("right", "brief", "scored")}
    rewards["brief"].options = {"limit": 3}
    rewards["sums"] = RewardEntry(kind="json_schema")
    assert columns_read_by_rewards(rewards) == KeptColumns(
        required=("answer", "data_source", "ground_truth"), optional=("extra_info", "level", "schema"), keeps_all=True
    )


@pytest.mark.parametrize(
    ("setting", "options", "pattern"),
    [
        ("needs_state", {}, "needs the parameter state, which is not given"),
        ("helper", {}, "has no such reward function, but right, brief, scored, needs_state"),
        ("brief", {"most": 1}, "options.most: brief has no such parameter"),
        ("", {}, "must be FILE.py:NAME"),
    ],
)
def test_wrong_functions_are_told(reward_file, setting, options, pattern):
    reward = RewardEntry(function=f"{reward_file}:{setting}" if setting else str(reward_file), options=options)
    (problem,) = reward_function_problems("mine", reward)
    assert problem.startswith("objective.rewards.mine.")
    assert pattern in problem


def test_copies_hold_what_the_file_imports_and_are_what_runs(reward_file, tmp_path):
    run_dir = tmp_path / "run"
    names = [file.relative_to(tmp_path).as_posix() for file in imported_files(reward_file)]
    assert names == ["more.py", "package/inner.py", "rewards.py", "words.py"]
    rewards = {"right": RewardEntry(function=f"{reward_file}:right"), "maths": RewardEntry(kind="maths")}
    copy_rewards(rewards, run_dir)
    ((file, name),) = function_locations(rewards, run_dir).values()
    assert (file, name) == (run_dir / "rewards/0/rewards.py", "right")
    assert file.read_text() == SOURCE
    # A file that has changed is another reward: refused once there is progress, and copied where it is accepted.
    before = reward_source_digests(rewards)
    (tmp_path / "more.py").write_text("changed = True\n")
    assert reward_source_digests(rewards) != before
    with pytest.raises(ConfigError, match=r"more.py differs .*run.accept=\[rewards\]"):
        renew_copies(rewards, run_dir, has_progress=True, accept=[])
    assert (run_dir / "rewards/0/more.py").read_text() == "import words\n"
    renew_copies(rewards, run_dir, has_progress=True, accept=["rewards"])
    assert (run_dir / "rewards/0/more.py").read_text() == "changed = True\n"
    # One that is gone does not keep a run from going on with its copy.
    reward_file.unlink()
    renew_copies(rewards, run_dir, has_progress=True, accept=[])


def test_copies_replace_nothing_that_is_the_users(reward_file, tmp_path):
    run_dir = tmp_path / "run"
    kept = run_dir / "rewards" / "mine.py"
    kept.parent.mkdir(parents=True)
    kept.write_text("def right(completions): ...\n")
    with pytest.raises(ConfigError, match="lies where the run keeps its copies"):
        copy_rewards({"right": RewardEntry(function=f"{kept}:right")}, run_dir)
    rewards = {"right": RewardEntry(function=f"{reward_file}:right")}
    with pytest.raises(ConfigError, match=r"has no rewards.json of an earlier run"):
        copy_rewards(rewards, run_dir)
    assert kept.read_text() == "def right(completions): ...\n"


def test_what_lies_in_a_run_directory_beside_the_copies_is_not_run(reward_file, tmp_path):
    run_dir = tmp_path / "run"
    rewards = {"right": RewardEntry(function=f"{reward_file}:right")}
    copy_rewards(rewards, run_dir)
    planted = run_dir / "rewards/0/json.py"
    planted.write_text("")
    renew_copies(rewards, run_dir, has_progress=True, accept=[])
    assert not planted.exists()
    # The manifest of a directory that was given away may say anything: the copies themselves are compared.
    (run_dir / "rewards/0/rewards.py").write_text("")
    with pytest.raises(ConfigError, match=r"rewards.py differs from the copy"):
        renew_copies(rewards, run_dir, has_progress=True, accept=[])


def test_prompts_that_no_answer_could_be_scored_for_are_named_before_a_run(tmp_path):
    """Two batches of documents, and one that no split took."""
    rows = [
        {"answer": "#### 4"},
        {"answer": "four"},
        None,
        {"answer": "5", "schema": {"type": "object"}},
        {"answer": "no split"},
    ]
    documents = [
        Document("p.jsonl", number, prompt="q", columns=columns) for number, columns in enumerate(rows, start=1)
    ]
    with pa.ipc.new_stream(tmp_path / DOCUMENTS_FILE, document_schema()) as file:
        file.write_batch(to_record_batch(documents[:2]))
        file.write_batch(to_record_batch(documents[2:]))
    train, evaluation = (SimpleNamespace(documents=np.array(numbers)) for numbers in ([2, 0, 1], [3]))
    data = SimpleNamespace(directory=tmp_path, has_rows=True, train=train, evaluation=evaluation, test=None)

    def check(*kinds, **options):
        rewards = {kind: RewardEntry(kind=kind, options=options) for kind in kinds}
        check_reward_rows(RoundsConfig(rewards=rewards), data)

    with pytest.raises(DataError) as refused:
        check("maths", "json_schema", "length", "judge")
    maths, json_schema = str(refused.value).split("\n  ")
    assert maths.startswith(
        "objective.rewards.maths: 2 of 4 prompts cannot be scored, whatever the model answers; mend them"
    )
    assert "p.jsonl:2: the right answer 'four' has no number" in maths
    assert "p.jsonl:3: needs the right answer, in one of the columns references, answer" in maths
    assert json_schema.startswith("objective.rewards.json_schema: 3 of 4 prompts")
    check("length", "judge")
    (tmp_path / "schema.json").write_text("{}")
    check("json_schema", schema=str(tmp_path / "schema.json"))
