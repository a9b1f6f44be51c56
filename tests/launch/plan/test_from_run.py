"""`shardtune plan from=<run>`: all choices estimated with what a run measured; the runs are written by hand, there is no GPU."""

import json
import pickle

import pytest

from launch import main as command
from launch.config.compose import compose_config
from launch.runs.freeze import write_run_config
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.planner import sweep
from trainer.reporting.file_version import FILE_VERSION

GPU = "NVIDIA A10G"
CARD = ["hardware=a10g", "strategy=fsdp2", "tuning=lora", "strategy.defer_sync=false"]
CARD += ["strategy.activation_checkpointing=none", "batch.global=8", "batch.micro=2", "budget.steps=10"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("from")
    data = write_chat_data(root / "chats.jsonl", 16)
    return [f"model.path={model_dir(root)}", f"data.path={data}", f"data.cache_dir={root / 'cache'}"]


@pytest.fixture(scope="module", autouse=True)
def simulated_once():
    """What is simulated is the same, with a run to go by and without."""
    simulate, known = sweep.simulate_variants, {}

    def ways(found, job, accumulation, settings, tell):
        key = pickle.dumps([[way.config for way in found], job, accumulation, settings])
        if key not in known:
            known[key] = simulate(found, job, accumulation, settings, tell)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "simulate_variants", ways)
        yield


def plan(capsys, *asked):
    code = command.main(["plan", *map(str, asked)])
    said = capsys.readouterr()
    return code, said.out + said.err, json.loads(said.out) if "--json" in asked and not code else {}


def write_run(directory, words, measured, **facts):
    """A run of fsdp2 on two cards, as its directory would be."""
    own = [word for word in CARD if not word.startswith("hardware=")]
    write_run_config(compose_config([*words, *own, "launcher.processes=2", "run.device=cpu"]), directory)
    receipt = {"predicted": {}, "measured": measured}
    known = {"strategy": "fsdp2", "world_size": 2, "micro_batch": 2, "precision": "bf16", "device": "cuda:0"}
    (directory / "run.json").write_text(json.dumps({**known, "receipt": receipt, **facts}))
    return directory


def test_plan_from_a_run_uses_what_the_run_measured(capsys, tmp_path, words):
    asked = [*words, *CARD, "launcher.gpus_per_node=2", "--json"]
    code, out, answer = plan(capsys, *asked)
    assert code == 0, out
    (before,) = answer["options"]
    peak, total = before["peak_gib"], before["step_s"]["total"]
    took = {"device_name": GPU, "step_s": 2 * total, "memory_gib": 1.1 * peak, "memory_reserved_gib": 1.32 * peak}
    took |= {"checkpoint_bytes": 6e9, "checkpoint_s": 2.0}
    run = write_run(tmp_path / "run", words, took)
    code, out, answer = plan(capsys, *asked, f"from={run}")
    assert code == 0, out
    (after,) = answer["options"]
    assert after["tokens_per_s"] == pytest.approx(before["tokens_per_s"] / 2)
    assert after["step_s"] == pytest.approx({key: 2 * value for key, value in before["step_s"].items()})
    assert after["hours"] == pytest.approx(2 * before["hours"]) and after["peak_gib"] == pytest.approx(peak)
    needed = answer["hardware"]["memory_gib"] - after["margin_gib"]
    beside = after["beside_gib"]
    assert beside["allocator"] == pytest.approx(0.2 * 1.1 * peak, abs=1e-8)
    assert needed == pytest.approx(1.32 * peak + beside["context"] + beside["nccl"], abs=1e-8)
    assert answer["checkpoint_s"] == pytest.approx(answer["checkpoint_gib"] * 2**30 / 3e9)
    code, out, _ = plan(capsys, *asked[:-1], f"from={run}")
    said = " ".join(out.split())
    assert f"from {run} (fsdp2, 2 x {GPU}): steps take 2.00 x the estimate" in said
    assert "tensors take 1.10 x what is simulated" in said and "reserves 20.0% beyond" in said
    assert "writes checkpoints at 3 GB/s" in said and "the figures above were measured" in said


def test_a_plan_of_rounds_counts_writing_and_takes_its_pace_from_a_run(capsys, tmp_path, words):
    """Ten steps of two prompts with four answers each: the budget is all rounds, and a run has measured both parts."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def even(completions):\n    return [len(text) % 2 for text in completions]\n")
    of_run = [*words, "objective=grpo", f"objective.rewards={rewards}", "objective.group_size=4"]
    of_run += ["objective.rollout.max_new_tokens=20"]
    asked = [*of_run, *CARD, "launcher.gpus_per_node=2", "--json"]
    code, out, answer = plan(capsys, *asked)
    assert code == 0, out
    (before,) = answer["options"]
    planned = before["round_s"]
    assert planned["scoring"] is None and planned["training"] == pytest.approx(before["step_s"]["total"])
    assert planned["total"] == pytest.approx(planned["writing"] + planned["training"])
    assert before["hours"] == pytest.approx(10 * planned["total"] / 3600)

    run = write_run(tmp_path / "run", of_run, {"device_name": GPU, "step_s": before["step_s"]["total"]})
    # Answers of ten tokens at most took as long as twenty were planned to take, so writing is half as fast.
    rows = [{"write_s": 1.0, "reward_s": 9.0, "completions/max_length": 10}]
    rows += 2 * [{"write_s": planned["writing"], "reward_s": 0.4, "completions/max_length": 10}]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n, row in enumerate(rows)))
    code, out, answer = plan(capsys, *asked, f"from={run}")
    assert code == 0, out
    (after,) = answer["options"]
    assert after["round_s"]["writing"] == pytest.approx(2 * planned["writing"])
    assert after["round_s"]["scoring"] == pytest.approx(0.4)
    assert after["hours"] == pytest.approx(10 * after["round_s"]["total"] / 3600)
    code, out, _ = plan(capsys, *asked[:-1], f"from={run}")
    said = " ".join(out.split())
    assert "writing takes 2.00 x the estimate" in said and "a round of 2 prompts x 4 answers of 20 tokens" in said


def test_plan_from_a_run_keeps_and_names_what_the_run_does_not_tell(capsys, tmp_path, words):
    """A peak below the simulated one is no proof: its longest documents need not have come together."""
    run = write_run(tmp_path / "run", words, {"device_name": GPU, "memory_gib": 1e-6, "step_s": None})
    asked = [*words, *CARD, "launcher.gpus_per_node=2", "--json"]
    known = [plan(capsys, *asked, *more)[2]["options"][0] for more in ([], [f"from={run}"])]
    assert known[0] == known[1]
    said = plan(capsys, *asked, f"from={run}")[2]["hardware"]["calibrated"]
    assert [line for line in said if line.startswith("not calibrated")] == [
        "not calibrated: it tells no time of a step",
        "not calibrated: it tells no memory that the allocator reserved",
        "not calibrated: it wrote no checkpoint",
    ]


@pytest.mark.parametrize(
    ("measured", "facts", "more", "said"),
    [
        ({"device_name": GPU}, {"device": "cpu"}, [], "it ran on cpu; a plan of GPUs goes by runs on GPUs"),
        (None, {}, [], "it has measured nothing yet"),
        ({"device_name": GPU}, {"receipt": None}, [], "holds no receipt"),
        ({"device_name": GPU}, {"version": FILE_VERSION + 1}, [], "cannot be read (it has version"),
        ({"device_name": GPU, "step_s": "fast"}, {}, [], "cannot be read (receipt.measured.step_s is not a number)"),
        ({"device_name": "NVIDIA L4"}, {}, [], f"it ran on NVIDIA L4, and hardware names {GPU}"),
        ({"device_name": GPU}, {}, ["from=other"], "from is given twice"),
    ],
)
def test_plan_from_a_run_that_tells_nothing_is_refused(capsys, tmp_path, words, measured, facts, more, said):
    run = write_run(tmp_path / "run", words, measured, **facts)
    code, out, _ = plan(capsys, *words, *CARD, f"from={run}", *more)
    assert code == 64 and said in out


def test_a_record_that_lacks_how_the_run_was_computed_calibrates_no_steps(capsys, tmp_path, words):
    facts = {"world_size": None, "micro_batch": 0, "precision": "fp7"}
    run = write_run(tmp_path / "run", words, {"device_name": GPU, "step_s": 1.0}, **facts)
    said = plan(capsys, *words, *CARD, "launcher.gpus_per_node=2", "--json", f"from={run}")[2]["hardware"]["calibrated"]
    assert any("its run.json does not say world_size, micro_batch, precision" in line for line in said)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("from=", "from=: from needs a value, as in from=runs/first"),
        ("from=nowhere", "from=nowhere: not a run directory"),
    ],
)
def test_words_that_name_no_run_are_refused(capsys, monkeypatch, tmp_path, words, word, said):
    monkeypatch.chdir(tmp_path)
    code, out, _ = plan(capsys, *words, *CARD, word)
    assert code == 64 and said in out
