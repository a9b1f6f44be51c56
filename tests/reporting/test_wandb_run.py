"""W&B as its users want it: names, columns, how a run ended, tables, the environment, and a network that is not there."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.config.compose import compose_config
from launch.export.command import ExportRequest, register_in_tracker, write_model_directory
from launch.sweep.multirun import run_all_points
from strategies import exit_codes
from strategies.errors import Diverged, Preempted
from tests.faults.runs import PACED
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment, command_here
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.wandb_files import inspected, record, summary
from tests.helpers.warm import heard
from tests.reporting.test_tracking import tracked
from trainer.monitors.kept_answers import read_kept_answers
from trainer.reporting.config import Alert, LoggingConfig, WandbMode
from trainer.reporting.status import RunState
from trainer.reporting.trackers import reachable, weights_and_biases
from trainer.reporting.trackers.base import RunEnding
from trainer.reporting.trackers.environment import apply_environment, wandb_mode_problems
from trainer.reporting.trackers.reachable import unreachable_reason
from trainer.reporting.tracking import final_summary, open_trackers
from trainer.session.lease import LeaseLost

KEY = "k3y" * 13 + "k"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("wandb")
    write_chat_data(path / "train.jsonl", 16)
    write_chat_data(path / "eval.jsonl", 4)
    model_dir(path)
    return path


def words(site, run, *more):
    found = [f"model.path={site / 'llama'}", f"data.path={site / 'train.jsonl'}", f"data.cache_dir={site / 'cache'}"]
    found += ["debug=tiny", "run.device=cpu", "logging.wandb=auto", "logging.report=false", f"run.dir={site / run}"]
    return [*found, *more]


def part_of(directory) -> Path:
    (found,) = (directory / "wandb").glob("offline-run-*")
    return found


def test_wandb_run_is_named_by_what_it_is_and_its_table_has_medians(site):
    more = ["tuning=lora", "strategy=fsdp2", "optim.lr=2e-4", "optim.weight_decay=0.02", "tuning.rank=4"]
    more += [f"data.eval_path={site / 'eval.jsonl'}", "logging.columns=[optim.weight_decay,tuning.rank,cluster=a1]"]
    more += ["logging.artifacts=true", "logging.group=mine", "logging.notes=a word", "logging.tags=[x]"]
    assert command_here(["train", *words(site, "named", *more)]) == 0
    part = part_of(site / "named")
    run = record(part, "run")
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("fsdp2-lora-lr2e-4", "mine", "train")
    found = summary(part)
    assert (found["state"], found["exit_code"], found["notes"], found["tags"]) == ("finished", 0, "a word", ["x"])
    columns = {key: value for key, value in found["config"].items() if key != "config"}
    expected = {"strategy": "fsdp2", "tuning": "lora", "objective": "sft", "optimizer": "adamw", "lr": 2e-4, "seed": 42}
    expected |= {"global_batch": 4, "micro_batch": 1, "accumulation": 4, "world_size": 1, "model": "llama"}
    expected |= {"data": "train.jsonl", "optim_weight_decay": 0.02, "tuning_rank": 4, "cluster": "a1"}
    assert {key: columns.get(key) for key in expected} == expected
    assert found["config"]["config"]["optim"]["lr"] == 2e-4, "and the whole configuration"
    numbers = found["summary"]
    names = ["tokens_per_s", "supervised_tokens_per_s", "step_s", "memory_gib", "loss", "eval/loss"]
    assert all(numbers[f"final/{name}"] > 0 for name in names)
    assert numbers["state"] == "done"
    made = record(part, "artifact")
    assert (made["type"], made["name"]) == ("model", f"model-{run['run_id']}")
    references = {Path(each["ref"].removeprefix("file://")) for each in made["manifest"]["contents"]}
    assert references == {path for path in (site / "named/export").rglob("*") if path.is_file()}


def test_export_job_of_a_pipeline_registers_the_model_that_the_run_left_to_it(site, monkeypatch):
    run_dir = site / "chained"
    (run_dir / "export").mkdir(parents=True)
    (run_dir / "export" / "model.safetensors").write_bytes(b"weights")
    checkpoint = run_dir / "checkpoints/step-000004"
    checkpoint.mkdir(parents=True)

    def read_header(directory):
        assert directory.is_dir()
        return SimpleNamespace(progress=SimpleNamespace(wandb_id="trained1"))

    monkeypatch.setattr("strategies.state.read_state_header", read_header)
    # Once it is exported, the run may delete the checkpoint before the model is registered.
    monkeypatch.setattr(
        "launch.export.writing.export_in_this_process", lambda config, job: shutil.rmtree(job.checkpoints[0])
    )
    request = ExportRequest(run_dir, checkpoint, run_dir / "export")
    write_model_directory(compose_config(words(site, "chained", "logging.artifacts=true")).config, request, 1)
    for parts in ("[train]", "[train,export]"):
        assert not (run_dir / "wandb").exists(), "a run that exports itself has registered its own"
        chain = ["launcher=slurm", f"launcher.pipeline={parts}", "logging.artifacts=true"]
        register_in_tracker(compose_config(words(site, "chained", *chain)).config, request)
    part = part_of(run_dir)
    run = record(part, "run")
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("export-chained", "chained", "export")
    made = record(part, "artifact")
    assert (made["type"], made["name"]) == ("model", "model-trained1") and run["run_id"] != "trained1"
    assert [each["ref"] for each in made["manifest"]["contents"]] == [(run_dir / "export/model.safetensors").as_uri()]


def test_data_that_an_online_run_uses_is_an_artifact(tmp_path, monkeypatch):
    """W&B takes what a run has used online only, so its own run is asked what it is handed."""
    used = []

    class Run:
        url, summary = "https://somewhere/run", {}

        def define_metric(self, *names, **how):
            pass

        def use_artifact(self, artifact):
            used.append(artifact)

    monkeypatch.setattr(weights_and_biases, "wandb_server_problem", lambda: None)
    monkeypatch.setattr("wandb.init", lambda **given: Run())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tokens.bin").write_bytes(b"x")
    config = LoggingConfig(wandb=WandbMode.online, artifacts=True)
    settings = {"data_fingerprint": "0123456789abcdef/train", "strategy": "ddp"}
    open_trackers(tracked(tmp_path, config, data=tmp_path / "data", settings=settings), {})
    (artifact,) = used
    assert (artifact.name, artifact.type, artifact.metadata["strategy"]) == ("data-0123456789ab", "dataset", "ddp")
    assert [entry.ref for entry in artifact.manifest.entries.values()] == [(tmp_path / "data/tokens.bin").as_uri()]


def test_wandb_run_that_diverges_is_failed_and_its_alert_says_why(site):
    more = ["optim.lr=1e30", "optim.max_skipped_steps=2", "logging.alerts=[diverged,preempted]"]
    with pytest.raises(Diverged):
        _in_process(words(site, "diverged", *more))
    part = part_of(site / "diverged")
    found, alert = summary(part), record(part, "alert")
    assert (found["state"], found["exit_code"], found["summary"]["state"]) == ("failed", 70, "diverged")
    assert found["tags"] == ["diverged"]
    assert alert["title"] == "single-full-lr1e30: diverged" and "not finite for 2 steps" in alert["text"]


def _in_process(given):
    from launch.train import main

    before = dict(os.environ)
    try:
        main(given)
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_wandb_run_that_was_stopped_is_no_failure_and_its_sync_line_names_all_parts(site):
    """TERM saves, and the same command goes on."""
    command = [sys.executable, "-m", "launch.main", "train"]
    command += words(site, "stopped", "budget.steps=400", "logging.alerts=[failed]", "checkpoint.save_final=false")
    command.append("run.threads=1")
    env = {key: value for key, value in clean_environment(**PACED).items() if key != "OMP_NUM_THREADS"}
    env["WANDB_DIR"] = str(site / "elsewhere")
    first, lines = heard(command, env, cwd=site)
    said = ""
    for line in lines:
        said += line
        if line.startswith("step 2/"):
            first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=seconds(120)) == 75, said
    assert re.search(r"^W&B: +wandb sync elsewhere/wandb/offline-run-\S+$", said, re.MULTILINE), said
    part = part_of(site / "elsewhere")
    assert record(part, "exit")["exit_code"] == 75
    assert '"type":"preempting"' in inspected(part) and record(part, "alert") == {}
    step = int(re.search(r"stopped at step (\d+)", said)[1])
    time.sleep(1.1)  # the parts are told apart by the second
    second, lines = heard(command, env, cwd=site)
    said = ""
    for line in lines:
        said += line
        if line.startswith(f"step {step + 1}/"):
            second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=seconds(120)) == 75, said
    parts = sorted(f"elsewhere/wandb/{each.name}" for each in (site / "elsewhere/wandb").glob("offline-run-*"))
    assert len(parts) == 2 and f"wandb sync {' '.join(parts)}" in said
    assert len({part.rsplit("-", 1)[1] for part in parts}) == 1, "one run for W&B"


@pytest.mark.parametrize("last", ["row", "end"])
def test_wandb_rows_survive_the_signal_that_ends_its_own_process(tmp_path, last):
    """SLURM's TERM goes to every process of a step, also to this one; what it has not written would be lost."""
    config = LoggingConfig(wandb=WandbMode.offline)
    run = weights_and_biases.WandbRun(tracked(tmp_path, config, run_id="abc"))
    for step in range(1, 5):
        run.log({"loss": 1.0 / step, "tokens": step}, step=step)
    run.summarise({"final/loss": 0.25})
    children = [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]
    assert children
    for child in children:
        child.terminate()
    psutil.wait_procs(children, timeout=seconds(20))
    if last == "row":
        run.log({"loss": 0.2, "tokens": 5}, step=5)
    run.close(RunEnding(RunState.preempted))
    parts = sorted((tmp_path / "wandb").glob("offline-run-*-abc"), key=lambda part: part.stat().st_mtime)
    assert run.hint is not None and all(part.name in run.hint[1] for part in parts)
    records = [json.loads(line) for line in inspected(parts[-1]).splitlines()]
    steps = [int(each["history"]["step"]["num"]) for each in records if each["type"] == "history"]
    assert steps == [1, 2, 3, 4, 5][: 5 if last == "row" else 4]
    found = summary(parts[-1])
    assert (found["summary"]["final/loss"], found["summary"]["state"]) == (0.25, "preempted")


def test_wandb_run_says_how_it_ended():
    assert (
        RunEnding.from_error(Preempted("x")).alert is Alert.preempted
        and RunEnding.from_error(LeaseLost("x")).state is RunState.preempted
    )
    assert (
        RunEnding.from_error(Diverged("x")).alert is Alert.diverged
        and RunEnding.from_error(RuntimeError("x")).exit_code == 70
    )
    assert RunEnding.from_error(KeyboardInterrupt()).exit_code == 130 and RunEnding(RunState.done).alert is None
    went_on = RunEnding(RunState.done, diverged=True)
    assert (went_on.alert, went_on.tracked_state) == (Alert.diverged, "diverged")
    assert (
        RunEnding(RunState.preempted).tracked_state == "preempted" and RunEnding(RunState.done).tracked_state == "done"
    )


def test_points_of_a_sweep_share_a_group_and_are_columns(site, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    seen = []

    def launch(composed, run_dir, *, isolate):
        seen.append(composed.config.logging)
        return 0

    given = [*words(site, "sweep")[:-1], f"run.dir={site / 'sweep'}", "optim.lr=1e-4,2e-4", "tuning=lora,full"]
    assert run_all_points(given, run_point=launch, show_point=None, check=True) == 0
    assert [each.name for each in seen] == ["lr1e-4-lora", "lr1e-4-full", "lr2e-4-lora", "lr2e-4-full"]
    assert {each.group for each in seen} == {"sweep"} and seen[0].columns == ["optim.lr", "tuning"]
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    seen.clear()
    assert run_all_points([*given, "logging.name=try"], run_point=launch, show_point=None, check=True) == 0
    assert {each.group for each in seen} == {"theirs"} and seen[0].name == "try-lr1e-4-lora"


def test_the_environment_decides_where_no_setting_does():
    given = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "a", "WANDB_TAGS": "x, y", "WANDB_MODE": "dryrun"}
    found = apply_environment(LoggingConfig(project="mine"), given)
    assert (found.config.project, found.config.name, found.config.tags) == ("mine", "a", ["x", "y"])
    assert found.config.wandb is WandbMode.offline
    assert {key: str(resolution) for key, resolution in found.resolutions.items()} == {
        "logging.name": "a (WANDB_NAME)",
        "logging.tags": "x, y (WANDB_TAGS)",
        "logging.wandb": "offline (WANDB_MODE)",
    }
    assert found.passed_over == "passed over: WANDB_PROJECT=theirs (logging.project is set)"
    same = apply_environment(LoggingConfig(wandb=WandbMode.online), {"WANDB_MODE": "online"})
    assert (same.config.wandb, same.passed_over) == (WandbMode.online, None)
    assert (
        "WANDB_MODE=shared (is none of online"
        in apply_environment(LoggingConfig(), {"WANDB_MODE": "shared"}).passed_over
    )
    assert apply_environment(LoggingConfig(), {}).config.wandb is WandbMode.offline


@pytest.mark.parametrize("mode", ["ofline", "Offline", ""])
def test_misspelt_wandb_mode_is_refused_before_the_run_starts(site, monkeypatch, capsys, mode):
    """W&B's client raises for it when the run begins: the run would train without its record."""
    monkeypatch.setenv("WANDB_MODE", mode)
    assert command_here(["train", *words(site, f"misspelt-{mode}")]) == exit_codes.WRONG_SETTING
    assert f"WANDB_MODE={mode}: must be online, offline or disabled" in capsys.readouterr().err
    assert not (site / f"misspelt-{mode}").exists()
    assert not [*wandb_mode_problems(LoggingConfig(wandb=WandbMode.disabled), {"WANDB_MODE": mode})]
    assert not [*wandb_mode_problems(LoggingConfig(), {"WANDB_MODE": "shared"})], "W&B itself knows it"


def test_wandb_online_without_an_account_is_offline_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    opened = open_trackers(tracked(tmp_path, LoggingConfig(wandb=WandbMode.online)), {})
    opened.trackers.close(RunEnding(RunState.done))
    assert "API key" in opened.substitutions["logging.wandb"]
    (hint,) = opened.trackers.hints
    assert hint[0] == "W&B" and hint[1].startswith("wandb sync ") and "offline-run" in hint[1]


def test_wandb_online_without_a_network_is_offline_and_says_so(site):
    """From the command line, with WANDB_MODE: a server that is not there used to end the run, after two minutes."""
    env = {key: value for key, value in clean_environment().items() if key != "OMP_NUM_THREADS"}
    env |= {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "launch.main", "train", *words(site, "nobody", "budget.steps=1")]
    done, lines = heard(command, env, cwd=site)
    said = lines.read()
    assert done.wait(seconds(200)) == 0 and "Traceback" not in said, said
    assert "logging.wandb: offline (http://127.0.0.1:9 cannot be reached: Connection refused)" in said
    assert "wandb sync nobody/wandb/offline-run" in said
    left = b"".join(path.read_bytes() for path in (site / "nobody").rglob("*") if path.is_file())
    assert KEY not in said and KEY.encode() not in left


def test_wandb_server_that_accepts_and_never_answers_is_unreachable(monkeypatch):
    monkeypatch.setattr(reachable, "REQUEST_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "no answer within" in unreachable_reason(f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(reachable, "TOTAL_TIMEOUT_S", 0.2)
    found = threading.Event()
    monkeypatch.setattr(reachable, "_failure_of_request", lambda address: found.wait() and None)
    try:
        assert "no answer within" in unreachable_reason("http://name.of.a.dead.server"), (
            "while its name is still looked up"
        )
    finally:
        found.set()


def test_tracker_error_shown_by_a_run_has_no_secret(tmp_path, monkeypatch):
    def fails(about):
        raise ValueError(f"the key {KEY} was refused at https://me:password@host")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(weights_and_biases, "WandbRun", fails)
    opened = open_trackers(tracked(tmp_path, LoggingConfig()), {})
    said = opened.substitutions["logging.wandb"]
    assert said.startswith("left out (ValueError: the key [secret] was") and "password" not in said


def test_wandb_summary_has_medians_and_the_largest_memory():
    speed = {"tokens_per_s": 14.0, "mfu": 0.5, "step_s": 2.0, "supervised_tokens_per_s": 7.0, "intervals": 3}
    found = final_summary({"tokens_per_s": 12.0, "loss": 1.5, "memory_gib": 2.0}, speed, {"eval/loss": 1.25})
    assert found == {
        "final/tokens_per_s": 14.0,
        "final/supervised_tokens_per_s": 7.0,
        "final/mfu": 0.5,
        "final/step_s": 2.0,
        "final/memory_gib": 2.0,
        "final/loss": 1.5,
        "final/eval/loss": 1.25,
    }


def shown_tables(part) -> dict[str, dict]:
    """Tables of the last step of an offline run, by name: where W&B's history says that they lie."""
    found = [json.loads(line) for line in inspected(part).splitlines()]
    items = [each["history"]["item"] for each in found if each["type"] == "history"]
    paths = {key.removesuffix(".path"): value for item in items for key, value in item.items() if key.endswith(".path")}
    kinds = {item.get(f"{name}._type") for item in items for name in paths} - {None}
    assert kinds <= {"table-file"}
    return {name: json.loads((part / "files" / path).read_text()) for name, path in paths.items()}


def test_wandb_tables_have_the_rows_of_tasks_where_asked_for(site):
    """Of a run that learns a task by heart, and of its evaluation beside the base; texts of data go nowhere unasked."""
    rows = [{"prompt": f"{word}?", "completion": word} for word in ("fox", "dog", "lazy | world", "7")]
    (site / "facts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = ["evaluation.tasks.facts.kind=exact_match", f"evaluation.tasks.facts.path={site / 'facts.jsonl'}"]
    asked += ["evaluation.tasks.facts.write.max_new_tokens=6"]
    learns = [f"data.path={site / 'facts.jsonl'}", "tuning=full", "optim.lr=1e-2", "budget.steps=25", "batch.global=4"]
    learns += [
        "batch.micro=4",
        "logging.tables=true",
        "logging.tensorboard=true",
        "run.threads=1",
        "export.at_end=false",
        "checkpoint.every_steps=15",
    ]
    shared = ["evaluation.watch=eval/facts/exact_match", *asked, *learns]
    assert command_here(["train", *words(site, "tables", *shared)]) == 0
    found = shown_tables(part_of(site / "tables"))
    assert found.keys() == {"eval/facts/worst_rows", "eval/facts/changed_rows"}
    changed, worst = found["eval/facts/changed_rows"], found["eval/facts/worst_rows"]
    assert changed["columns"] == ["now", "row", "prompt", "answer", "answer before"]
    last = json.loads((site / "tables" / "metrics.jsonl").read_text().splitlines()[-1])["eval/facts/exact_match"]
    assert len(changed["data"]) == round(4 * last) > 0 and {row[0] for row in changed["data"]} == {"right"}
    assert {row[3] for row in changed["data"]} <= {"fox", "dog", "lazy | world", "7"}
    assert worst["columns"][:2] == ["row", "match"] and len(worst["data"]) == 4
    assert [row[1] for row in worst["data"]] == sorted(row[1] for row in worst["data"])

    shutil.copytree(
        site / "tables", site / "tables-stopped", ignore=shutil.ignore_patterns("wandb", "step-000025", "status.json")
    )
    assert command_here(["train", *words(site, "tables-stopped", *shared)]) == 0
    kept, resumed = (read_kept_answers(site / name) for name in ("tables", "tables-stopped"))
    assert resumed == kept and (kept["first"]["step"], kept["last"]["step"]) == (0, 25)
    answers = [row["answer"] for row in kept["last"]["tasks"]["facts"]]
    assert set(answers) & {"fox", "dog", "lazy | world", "7"}
    assert shown_tables(part_of(site / "tables-stopped"))["eval/facts/changed_rows"] == changed, (
        "after a stop since the first one"
    )

    kept = [(site / run / "first-rows.json").stat().st_mtime_ns for run in ("tables", "tables-stopped")]
    assert kept[0] == kept[1], "it went on from step 15"

    told = ["evaluate", str(site / "tables"), "against=base", f"to={site}/judged", "evaluation.resamples=50"]
    assert command_here(told) == 0
    part = part_of(site / "judged" / "evaluation")
    again = shown_tables(part)
    assert again["eval/facts/changed_rows"] == changed and again["eval/facts/worst_rows"] == worst
    about = summary(part)
    assert (record(part, "run")["job_type"], about["summary"]["eval/facts/exact_match"]) == ("evaluate", last)
    assert about["config"]["against"] == "base"

    assert command_here([*told[:3], f"to={site}/quiet", told[4], "logging.tables=false"]) == 0
    assert not (site / "quiet" / "evaluation" / "wandb").exists()
