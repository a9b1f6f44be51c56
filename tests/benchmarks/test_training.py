"""The training benchmark: its bare loop does what the trainer does, its arithmetic is right, and it runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from strategies import runtime as processes
from strategies.parameters import named_parameters
from tests.helpers.building import GLOBAL_BATCH, data_set, model_dir, run_config, take_steps, trainer_for
from tests.helpers.covering import EVERYTHING
from tests.helpers.learning import LEAST_LEARNED, learned
from tests.helpers.speed import seconds
from trainer.optim.config import AdamwConfig
from trainer.optim.schedule import ScheduleConfig, ScheduleName
from trainer.tuning.base import LoraConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts are no package of the product

from training import bare, tables  # noqa: E402
from training.cases import BARE, HF, OURS, Group  # noqa: E402
from training.drive import Measured, reason  # noqa: E402
from training.inputs import SMALL  # noqa: E402
from training.ranks import report as ranks_report  # noqa: E402
from training.ranks import speed  # noqa: E402

STEPS = 5


@pytest.fixture(scope="module")
def runtime():
    started = processes.join_job("cpu", timeout_s=60, threads=1)
    yield started
    processes.leave_job()


def as_rows(trainer):
    """The documents of each step as the bare loop takes them."""

    def row(index):
        sample = trainer.loader.dataset.sample(index)
        pairs = zip(sample.input_ids.tolist(), sample.supervised.tolist(), strict=True)
        return {"input_ids": sample.input_ids.tolist(), "labels": [t if s else -100 for t, s in pairs]}

    steps = [trainer.loader.plan(step * GLOBAL_BATCH) for step in range(STEPS)]
    return [[row(index) for slot in plan[0] for index in slot] for plan in steps]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bare_loop_takes_the_steps_of_the_trainer(tmp_path, runtime, tuning):
    config = run_config(
        model_dir(tmp_path),
        "single",
        tuning,
        micro=GLOBAL_BATCH,
        steps=STEPS,
        optim=AdamwConfig(lr=1e-3, weight_decay=0.0, max_grad_norm=1.0),
        schedule=ScheduleConfig(name=ScheduleName.constant, warmup_share=0.0),
    )
    if tuning == "lora":
        config = replace(config, tuning=LoraConfig())
    trainer = trainer_for(config, data_set(tmp_path, uneven=True), runtime)
    model = bare.build(config.model.path, tuning)
    if tuning == "lora":  # adapters are drawn by each library in its own way: start from the same ones
        drawn = {
            name.removeprefix("model."): parameter.detach().clone()
            for name, parameter in named_parameters(trainer.engine.step_module)
            if "lora_" in name
        }
        own = dict(model.named_parameters())
        assert set(drawn) == {name for name in own if "lora_" in name}
        for name, value in drawn.items():
            own[name].data.copy_(value)
    expected = take_steps(trainer, STEPS)
    found = []
    rows = as_rows(trainer)
    bare.train(model, rows, lr=1e-3, each=lambda loss, norm: found.append((float(loss), float(norm))))
    at_rest = replace(config, optim=replace(config.optim, lr=0.0))
    still = take_steps(trainer_for(at_rest, data_set(tmp_path, uneven=True), runtime), STEPS)
    assert learned(expected, still) > LEAST_LEARNED  # or the steps would all be the first one
    for (loss, norm), (bare_loss, bare_norm) in zip(expected, found, strict=True):
        assert bare_loss == pytest.approx(loss, rel=1e-5)
        assert bare_norm == pytest.approx(norm, rel=1e-5)


def stretch(tokens, cpu, aside=0.0):
    times = {"cpu": cpu, "wall": 2 * cpu, "aside_cpu": aside, "aside_wall": 2 * aside}
    return {"tokens": tokens, "slots": 2 * tokens, "steps": 4, "peak": 100.0 + tokens, **times}


def measured(cpus, loss, aside=0.0):
    ready = {"cpu": 3.0, "wall": 4.0, "aside_cpu": 0.0}
    end = {"loss": loss, "version": "x 1"}
    return Measured(ready=ready, stretches=[stretch(100, cpu, aside) for cpu in cpus], end=end)


GROUP = Group("full", "Full", (OURS, BARE, HF))


def test_ratios_are_medians_of_ratios_within_a_round():
    # Load doubled the CPU time of the second round for both: the ratio of each round is 2, 2 and 4.
    found = {OURS.name: measured([1.5, 2.5, 1.5], 7.0, aside=0.5), BARE.name: measured([1.0, 2.0, 1.0], 7.0)}
    found[HF.name] = measured([2.0, 4.0, 4.0], 7.0)
    by_name = {one["name"]: one for one in tables.rows(GROUP, found)}
    assert by_name[HF.name]["ours_over"] == 2.0
    assert by_name[OURS.name]["of_bare"] == 1.0, "evaluation and checkpoint are set aside"
    assert by_name[HF.name]["of_bare"] == 0.5
    assert by_name[HF.name]["rate"] == 25.0
    assert by_name[HF.name]["padding"] == 0.5
    assert by_name[OURS.name]["step_ms"] == 250.0
    assert by_name[OURS.name]["aside_cpu_s"] == 1.5
    assert [line.rsplit(": ")[-1] for line in tables.targets({"full": list(by_name.values())})] == ["holds"] * 3


def test_benchmark_gives_no_rate_to_a_trainer_whose_loss_disagrees():
    found = {OURS.name: measured([1.0], 7.0), BARE.name: measured([1.0], 7.0), HF.name: measured([0.1], 7.01)}
    made = tables.rows(GROUP, found)
    (line,) = [line for line in tables.table(made) if line.startswith(f"| {HF.name} |")]
    assert "loss disagrees" in line and "1,000" not in line
    assert not any("best default" in line for line in tables.targets({"full": made})), "nothing is claimed over it"
    found[HF.name] = measured([0.1], 7.0001)
    made = tables.rows(GROUP, found)
    assert any("1,000" in line for line in tables.table(made))
    (line,) = [line for line in tables.targets({"full": made}) if "best default" in line]
    assert line.endswith("0.100 (at least 2.000): MISSED")


def test_arithmetic_of_the_model():
    assert SMALL.matmul_parameters == 13_762_560
    assert SMALL.attention_flops(8192) / SMALL.attention_flops(128) == 64
    assert SMALL.flops_per_token(0) == 6 * 13_762_560
    assert SMALL.flops_per_token(0, lora=True) == 4 * 13_762_560


def test_benchmark_reason_of_a_failure_is_its_last_error():
    log = 'File "x.py"\nValueError: first\n  File "Error.py", line 3\nlightning.MisconfigurationError: no: card\nbye\n'
    assert reason(log) == "lightning.MisconfigurationError: no: card"
    assert reason("killed\n") == "killed"
    assert reason("") == "no output"


def test_speed_of_ranks_leaves_the_warm_up_out(tmp_path):
    rows = [{"step": n, "loss": 9.0 - n, "step_tokens": 100 * n, "step_s": 10.0 if n < 3 else 1.0} for n in range(1, 5)]
    lines = [*rows[:2], {"step": 2, "eval/loss": 8.0, "tokens": 300}, *rows[2:]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert speed(tmp_path) == (350.0, [8.0, 7.0, 6.0, 5.0])


@pytest.mark.skipif(not EVERYTHING, reason="trains three times over: make test-all")
def test_training_benchmark_runs_and_its_losses_agree(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "SHARDTUNE_BENCH_WORK": str(tmp_path / "work")}
    words = ["--dry-run", "--peers=none", "--groups=full", f"--results={tmp_path}"]
    command = [sys.executable, str(BENCHMARKS / "training.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(300))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "training.json").read_text())
    ours, bare_loop = (next(r for r in found["rows"]["full"] if r["name"] == c.name) for c in (OURS, BARE))
    assert ours["difference"] < 1e-6 and ours["loss"] < 6.2  # it has learned: an untrained one has log(512) = 6.24
    assert ours["rate"] > 0 and ours["aside_cpu_s"] > 0 and bare_loop["aside_cpu_s"] == 0
    (mine,), (limit,) = (found["measured"]["full"][c.name]["stretches"] for c in (OURS, BARE))
    assert mine["tokens"] == limit["tokens"] == mine["slots"], "both saw the same documents, without padding"
    assert "| shardtune |" in (tmp_path / "training.md").read_text()


def test_two_processes_are_judged_at_the_default_batch_and_peers_compared_with_ddp():
    ways = ("one process", "independent processes", "ddp", "fsdp2", "zero2")

    def table(batch: int, fsdp2: float) -> dict:
        scaling = dict(zip(ways, (1.0, 1.9, 1.8, fsdp2, 1.7), strict=True))
        rates = {way: [1000 * times] * 3 for way, times in scaling.items()}
        return {
            "batch": batch,
            "steps": 8,
            "rates": rates,
            "scaling": scaling,
            "difference": dict.fromkeys(ways[2:], 1e-7),
        }

    facts = {"command": "c", "minutes": 1.0, "hardware": "h", "model": "m", "rounds": 3}
    facts |= {"peers": {"rates": {"TRL": [600.0]}, "losses": {}, "left_out": {"axolotl": "no accelerator"}}}
    text = ranks_report(2, facts | {"tables": [table(32, 1.65), table(8, 1.4)]}, [1.0])
    assert (
        "- fsdp2 and zero2 on 2 processes, 32 conversations per step: 1.65 times one process (at least 1.6): holds"
        in text
    )
    assert "| TRL | 600 | 3.00 times as fast |" in text and "- left out: axolotl: no accelerator" in text
    text = ranks_report(2, facts | {"tables": [table(32, 1.5), table(8, 1.7)]}, [1.0])
    assert "1.50 times one process (at least 1.6): MISSED" in text
