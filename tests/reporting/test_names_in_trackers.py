"""What trackers hold after a real run of each objective, read back by their own libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import clean_environment, command_here
from tests.helpers.seq2seq import seq2seq_dir
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data, write_jsonl, write_pairs
from tests.helpers.wandb_files import inspected
from tests.reporting.test_other_trackers import twice

TEXTS = "data.path=texts.jsonl data.eval_path=texts.jsonl"
RUNS = {
    "sft": "data.path=chat.jsonl data.eval_path=chat.jsonl logging.step_parts=true logging.x=tokens "
    "logging.reference_tflops=1",
    "pretrain": f"objective=pretrain {TEXTS}",
    "dpo": "objective=dpo data.path=pairs.jsonl data.eval_path=pairs.jsonl tuning=lora tuning.rank=4",
    "orpo": "objective=orpo data.path=pairs.jsonl data.eval_path=pairs.jsonl",
    "simpo": "objective=simpo data.path=pairs.jsonl data.eval_path=pairs.jsonl",
    "reward": "objective=reward data.path=pairs.jsonl data.eval_path=pairs.jsonl",
    "kto": "objective=kto data.path=pairs.jsonl data.eval_path=pairs.jsonl",
    "classification": "objective=classification data.path=labels.jsonl data.eval_path=labels.jsonl",
    "distillation": "objective=distillation objective.teacher.path=llama objective.sft_weight=0.5 data.path=chat.jsonl "
    "data.eval_path=chat.jsonl",
    "seq2seq": "objective=seq2seq model.path=t5 data.path=asked.jsonl data.eval_path=asked.jsonl data.max_length=128 "
    "objective.max_target=64",
    "grpo": "objective=grpo objective.rewards=rewards.py objective.group_size=2 objective.rollout.max_new_tokens=6 "
    "objective.kl.weight=0.1 data.path=questions.jsonl data.eval_path=questions.jsonl",
}
"""Words of a run by its objective."""
if not EVERYTHING:  # they log what `sft` and `dpo` log, and each run is written to four trackers
    for objective in ("pretrain", "orpo", "simpo", "reward"):
        del RUNS[objective]
COUNTERS = {"train/global_step", "train/epoch", "train/num_tokens", "train/num_supervised_tokens", "time/training_s"}
IN_ALL = COUNTERS | {
    *("train/loss", "train/grad_norm", "train/learning_rate", "time/step_s", "time/data_wait_s", "memory/peak_gib"),
    *("speed/tokens_per_s", "speed/tokens_per_s_per_rank", "speed/supervised_tokens_per_s"),
    *("data/step_tokens", "data/balance"),
}
"""What every run logs of a step."""
PAIRS = {f"train/rewards/{name}" for name in ("margins", "accuracies", "chosen", "rejected")}
"""What an objective over pairs, or over answers that are rated one by one, logs in TRL, too."""
OF_ANSWERS = {
    *("train/reward", "train/reward_std", "train/frac_reward_zero_std", "train/entropy", "train/kl"),
    *("train/rewards/vowels/mean", "train/rewards/vowels/std", "train/sampling/sampling_logp_difference/mean"),
    *(f"train/completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")),
    *(f"train/clip_ratio/{name}_mean" for name in ("low", "high", "region")),
    *("train/answers/unscored", "train/answers/timed_out", "speed/written_tokens_per_s"),
    *("time/train_s", "time/write_s", "time/reward_s", "time/look_back_s"),
}
"""What a run that writes its own answers logs of them: what TRL's GRPO does under the same names, and times of the rounds."""
TERMS = {
    "sft": {"time/forward_s", "time/backward_s", "time/optimizer_s", "speed/mfu"},
    "dpo": PAIRS,
    "orpo": PAIRS,
    "simpo": PAIRS,
    "reward": PAIRS,
    "kto": PAIRS | {"train/kl"},
    "classification": {"train/accuracy"},
    "distillation": {"train/divergence", "train/sft_loss"},
    "grpo": OF_ANSWERS,
}
"""What a run logs of a step besides, by its objective."""
EPOCHS = {"kto": 0.5, "grpo": 0.5}
"""Epochs of the eight samples of a run; both answers of a pair are samples of their own to KTO, and two to a prompt of GRPO."""
WATCHED = {"grpo": "eval/reward"}
"""The first held-out metric where that is not the loss."""


def train_all(root: Path) -> dict[str, dict]:
    """Train two steps with each objective in the current directory.

    Returns what each tracker has of each run, by objective (`runs`), what trackio has of a resumed run (`twice`), and the sizes
    of the model's linear layers (`projections`).
    """
    model_dir(root)
    seq2seq_dir(root)
    write_chat_data(root / "chat.jsonl", 8)
    write_pairs(root / "pairs.jsonl", 8)
    write_jsonl(root / "texts.jsonl", [{"text": f"the quick brown fox {n}"} for n in range(8)])
    write_jsonl(root / "labels.jsonl", [{"text": f"a dog {n}", "label": "ab"[n % 2]} for n in range(8)])
    write_jsonl(root / "questions.jsonl", [{"question": f"a fox {n}", "answer": f"a dog {n}"} for n in range(8)])
    (root / "rewards.py").write_text(
        "def vowels(completion):\n    return 1.0 + sum(c in 'aeiou' for c in completion)\n"
    )
    write_jsonl(root / "asked.jsonl", [{"prompt": f"a fox {n}", "response": f"a dog {n}"} for n in range(8)])
    shared = "model.path=llama data.cache_dir=cache run.device=cpu run.matmul=blas run.threads=1 budget.steps=2 batch.micro=2 "
    shared += "batch.global=4 logging.project=names logging.wandb=offline logging.mlflow=true logging.trackio=true "
    shared += "logging.tensorboard=true logging.report=false logging.every_steps=2 export.at_end=false "
    shared += "checkpoint.save_final=false evaluation.at_start=false precision=fp32"
    for name, words in RUNS.items():
        assert command_here(["train", *shared.split(), f"run.dir={name}", f"logging.name={name}", *words.split()]) == 0
    of_runs = {name: held_by_trackers(root / name) for name in RUNS}
    return {"runs": of_runs, "twice": twice_in_trackio(root), "projections": projections_of(root / "llama")}


def projections_of(model: Path) -> list[tuple[int, int]]:
    """(outputs, inputs) of each linear layer inside the blocks of a model, as its file says."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "np") as tensors:
        return [tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys() if "_proj." in name]  # noqa: SIM118


def twice_in_trackio(root: Path) -> dict:
    """What trackio has of a run that was stopped, and resumed until it diverged."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (root / "run").mkdir()
    run_id, hints = twice(root, trackio=True)
    (run,) = trackio.Api().runs("notes")
    rows = SQLiteStorage.get_logs("notes", run.name)
    return {"id": run_id, "hints": hints, "name": run.name, "config": run.config, "alerts": run.alerts(), "rows": rows}


def held_by_trackers(run_dir: Path) -> dict:
    """Names and last numbers that each tracker has of a run, and W&B's definitions of metrics."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    (part,) = (run_dir / "wandb").glob("offline-run-*")
    records = [json.loads(line) for line in inspected(part).splitlines()]
    wandb_rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("names").experiment_id
    (tracked,) = client.search_runs([experiment], f"attributes.run_name = '{run_dir.name}'")
    (trackio_name,) = [name for name in SQLiteStorage.get_runs("names") if name.startswith(run_dir.name)]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {
        "metrics.jsonl": [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()],
        "run.json": json.loads((run_dir / "run.json").read_text())["metric_names"],
        "wandb": wandb_rows,
        "definitions": [record["metric"] for record in records if record["type"] == "metric"],
        "config": next(record["run"]["config"]["update"] for record in records if record["type"] == "run"),
        "mlflow": tracked.data.metrics,
        "trackio": SQLiteStorage.get_logs("names", trackio_name),
        "tensorboard": {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]},
    }


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What the trackers hold. In a process of its own: trackio takes its place when it is imported."""
    for package in ("mlflow", "trackio", "tensorboard"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("names")
    env = clean_environment(TRACKIO_DIR=str(root / "trackio"))
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "tests.reporting.test_names_in_trackers", str(root)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds(300))
    assert done.returncode == 0 and "Reserved keys" not in done.stderr, done.stderr[-3000:]
    return json.loads((root / "held.json").read_text())


@pytest.fixture(scope="module")
def held(everything):
    """What the trackers hold of runs, by objective."""
    return everything["runs"]


@pytest.mark.parametrize("objective", RUNS)
def test_trackers_have_the_same_names_and_numbers_of_a_run(held, objective):
    run = held[objective]
    (evaluation,) = [row for row in run["metrics.jsonl"] if "loss" not in row]
    last_step = [row for row in run["metrics.jsonl"] if "loss" in row][-1]
    of_evaluation = {name for name in evaluation if "/" in name or name == "forgetting"}
    watched = WATCHED.get(objective, "eval/loss")
    assert watched in of_evaluation and {*evaluation} - of_evaluation == {"step", "tokens", "epoch"}
    expected = IN_ALL | TERMS.get(objective, set()) | of_evaluation

    names_of = {
        "wandb": {name for row in run["wandb"] for name in row if not name.startswith("_")},
        "mlflow": {name for name in run["mlflow"] if not name.startswith("final/")},
        "trackio": {name for row in run["trackio"] for name in row if not name.startswith("final/")},
        "tensorboard": {name for name in run["tensorboard"] if not name.startswith("final/")},
    }
    names_of["trackio"] -= {"timestamp", "step", "state"}  # trackio's own, and how the run ended
    for tracker, names in names_of.items():
        assert names == expected, tracker

    last_values = {name: value for row in run["wandb"] for name, value in row.items()}
    for tracked in (last_values, run["mlflow"]):
        assert tracked["train/loss"] == last_step["loss"] and tracked["train/learning_rate"] == last_step["lr"]
        assert tracked["train/global_step"] == last_step["step"] == 2
        assert tracked["train/num_tokens"] == last_step["tokens"]
        assert tracked["train/epoch"] == last_step["epoch"] == EPOCHS.get(objective, 1.0)
        assert tracked["time/training_s"] == pytest.approx(2 * last_step["step_s"])
        assert tracked[watched] == evaluation[watched]
        if objective == "grpo":
            assert tracked["train/reward"] == last_step["reward"] == last_step["rewards/vowels/mean"] > 0
            assert tracked["train/rewards/vowels/mean"] == last_step["rewards/vowels/mean"]
            assert tracked["train/completions/mean_length"] == last_step["completions/mean_length"] > 0
            assert tracked["time/write_s"] == last_step["write_s"] > 0
            assert tracked["time/reward_s"] == last_step["reward_s"] > 0


def test_a_run_says_which_names_it_has_and_wandb_hides_counters(held):
    assert {run["run.json"] for run in held.values()} == {run["config"]["metric_names"] for run in held.values()} == {3}
    for objective, run in held.items():
        hidden = {each["name"] for each in run["definitions"] if each.get("options", {}).get("hidden")}
        assert hidden == COUNTERS
        (every,) = [each for each in run["definitions"] if each.get("glob_name") == "*"]
        assert every["step_metric"] == ("train/num_tokens" if objective == "sft" else "train/global_step")


def test_a_run_has_columns_of_its_size(everything):
    held = everything["runs"]
    columns = held["sft"]["config"]
    assert columns["parameters"] == columns["trainable"] > 0
    assert (columns["hosts"], columns["world_size"], columns["rank"]) == (1, 1, None)
    of_adapter = held["dpo"]["config"]
    assert (of_adapter["rank"], of_adapter["tuning"]) == (4, "lora")
    # LoRA of rank 4 puts two matrices beside each linear layer.
    adapter_size = sum(4 * (outputs + inputs) for outputs, inputs in everything["projections"])
    assert of_adapter["trainable"] == adapter_size > 0
    assert of_adapter["parameters"] == columns["parameters"] + adapter_size


def test_trackio_run_reads_back(everything):
    found = everything["twice"]
    assert found["name"] == f"fsdp2-lora-lr2e-4-{found['id'][:6]}"
    assert found["hints"] == [["trackio", "trackio show --project notes"]]
    assert found["config"]["lr"] == 2e-4 and found["config"]["_Group"] == "g"
    losses = [(row["step"], row["train/loss"]) for row in found["rows"] if "train/loss" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [row["state"] for row in found["rows"] if "state" in row] == ["preempted", "diverged"]
    alerts = [(alert["title"], alert["text"]) for alert in found["alerts"]]
    assert alerts == [("fsdp2-lora-lr2e-4: diverged", "not finite")]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.chdir(root)
    (root / "held.json").write_text(json.dumps(train_all(root), default=str))
