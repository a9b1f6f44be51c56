"""Runs read out of W&B's own files: as their directories say it."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from launch.compare import wandb_files
from launch.compare.names import setting_differences
from launch.compare.run_files import measure_run, read_recorded_run
from launch.compare.wandb_files import is_wandb_directory, read_from_wandb_server, read_wandb_directory, wandb_address
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_chat_data
from trainer.reporting.trackers import wandb_server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, two evaluations and the one before, with W&B's files of it."""
    root = tmp_path_factory.mktemp("wandb")
    data = write_chat_data(root / "train.jsonl", 16)
    words = [f"model.path={model_dir(root)}", f"data.path={data}", f"data.eval_path={data}", "logging.report=false"]
    words += ["batch.global=8", "budget.steps=4", "evaluation.every_steps=2", "export.at_end=false", "run.device=cpu"]
    words += [f"data.cache_dir={root / 'cache'}", "logging.wandb=offline", "logging.every_steps=1", "run.matmul=blas"]
    assert command_here(["train", *words, f"run.dir={root / 'run'}", "checkpoint.save_final=false"]) == 0
    (part,) = (root / "run/wandb").glob("offline-run-*")
    return root / "run", part


@pytest.fixture(autouse=True, scope="module")
def inspected_once():
    """W&B's command takes a second, and prints the same of the same files."""
    inspect, printed = wandb_files._run_wandb_inspect, {}

    def once(part):
        files = tuple((file, file.stat().st_mtime_ns) for file in part.absolute().glob("*.wandb"))
        completed = printed.get(files) or inspect(part)
        if files and completed.returncode == 0:
            printed[files] = completed
        return completed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_files, "_run_wandb_inspect", once)
        yield


def test_wandb_files_hold_what_the_run_directory_has(run):
    ours, theirs = read_recorded_run(run[0]), read_wandb_directory(run[1])
    assert theirs.steps == ours.steps and len(ours.steps) == 4
    assert theirs.evaluations == ours.evaluations and list(ours.evaluations) == [0, 2, 4]
    assert setting_differences([ours, theirs]) == []  # also where JSON has 0.0 as 0
    assert (theirs.state, theirs.unfinished_state) == ("done", None)
    for key in ("host", "world_size", "data_fingerprint"):
        assert getattr(theirs.record, key) == getattr(ours.record, key)
    assert measure_run(theirs).tokens_per_s == measure_run(ours).tokens_per_s


def test_wandb_files_are_compared_and_left_as_they_are(run, tmp_path, capsys):
    before = sorted(run[1].rglob("*"))
    assert command_here(["compare", str(run[1])]) == 0
    assert sorted(run[1].rglob("*")) == before
    assert command_here(["compare", str(run[0]), str(run[1]), f"to={tmp_path / 'answer'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "same loss as run, to the last digit over 4 steps" in said and "what differs" not in said
    assert (tmp_path / "answer/compare.md").is_file()


EARLIER = Path(__file__).parents[2] / "golden" / "first_edition_names.tar.gz"
"""A run of revision e367b717, which wrote the names of `metrics.jsonl` to trackers: W&B's files, a tiny model, the data.

Its checkpoint of step 2 of 4 is there. The archive is never made anew by a later version: that is what it is for.
"""
EARLIER_WORDS = (
    "train model.path=llama data.path=train.jsonl data.eval_path=eval.jsonl logging.report=false batch.global=8 budget.steps=4 "
    "evaluation.every_steps=2 export.at_end=false run.device=cpu precision=fp32 data.cache_dir=cache logging.wandb=offline "
    "logging.every_steps=1 run.matmul=blas run.dir=run logging.tensorboard=true checkpoint.every_steps=2 tuning=lora "
    "tuning.rank=2 run.accept=[code,versions]"
)


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """W&B's files of the earlier run. Its directory is `run`, below the current one."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    (part,) = Path("run/wandb").glob("offline-run-*")
    return part


def test_wandb_files_with_earlier_names_are_read_and_compared_with_todays(earlier, run, capsys):
    ours, theirs = read_recorded_run(Path("run")), read_wandb_directory(earlier)
    assert theirs.steps == ours.steps and list(ours.steps) == [1, 2, 3, 4]
    assert theirs.evaluations == ours.evaluations and list(ours.evaluations) == [0, 2, 4]
    assert (theirs.record.metric_names, read_wandb_directory(run[1]).record.metric_names) == (1, 3)
    assert theirs.unfinished_state is None and theirs.status["step"] == 4
    capsys.readouterr()
    assert command_here(["compare", str(earlier), str(run[1]), "to=answer", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["runs"]
    losses = [read_wandb_directory(part).steps[4]["loss"] for part in (earlier, run[1])]
    assert [point["measured"]["loss"] for point in points] == losses and None not in losses


def test_a_run_that_goes_on_keeps_the_names_it_began_with(earlier):
    assert command_here(EARLIER_WORDS.split()) == 0
    assert json.loads(Path("run/run.json").read_text())["metric_names"] == 1
    ours, theirs = read_recorded_run(Path("run")), read_wandb_directory(earlier)
    assert len(wandb_files.wandb_start_directories(earlier)) == 2
    assert theirs.steps == ours.steps and theirs.evaluations == ours.evaluations
    assert "epoch" not in ours.steps[2] and ours.steps[4]["epoch"] == 2.0
    records = list(wandb_files._read_wandb_records(wandb_files.wandb_start_directories(earlier)[-1], []))
    names = {name for record in records if record["type"] == "history" for name in record["history"]["item"]}
    assert {"train_step", "loss", "tokens", "eval/loss"} < names and not any("train/" in name for name in names)
    axes = {each["metric"].get("step_metric") for each in records if each["type"] == "metric"}
    assert axes == {"tokens", None}


def test_wandb_file_that_is_torn_is_read_up_to_the_damage(run, tmp_path):
    torn = tmp_path / run[1].name
    shutil.copytree(run[1], torn)
    (file,) = torn.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-300])
    point = read_wandb_directory(torn)
    assert point.state == "running" and 1 in point.steps


def test_a_damaged_place_of_a_wandb_file_is_told(run, tmp_path, capsys):
    damaged = tmp_path / run[1].name
    shutil.copytree(run[1], damaged)
    (file,) = damaged.glob("*.wandb")
    content = bytearray(file.read_bytes())
    content[-400:-380] = bytes(20)
    file.write_bytes(content)
    assert read_wandb_directory(damaged).unreadable_lines == 1
    assert command_here(["compare", str(run[1]), str(damaged)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{damaged}: 1 line of its metrics or events cannot be read" in told


def test_wandb_files_of_all_starts_are_one_run(monkeypatch, tmp_path):
    """One directory for each start; steps that were taken again are those of the last one."""
    parts = [tmp_path / f"{name}-x1" for name in ("offline-run-20260102_000000", "run-20260101_000000")]
    for part in [*parts, tmp_path / "offline-run-20260103_000000-x2"]:
        part.mkdir()
        (part / "run-x1.wandb").touch()

    def records(part, damage):
        number = parts.index(part)  # the first start is the second of them
        rows = [(1, 3.0), (2, 2.5)] if number else [(2, 2.0), (3, "NaN")]
        yield {"type": "run", "run": {"config": {"update": {"config": {"strategy": {"name": "ddp"}}}}}}
        for step, loss in rows:
            item = {"train_step": step, "loss": loss, "loss/a": 1.0, "blocks_s": 1.0, "blocks_s/worst": 2.0}
            yield {"type": "history", "history": {"item": item}}
        yield {"type": "summary", "summary": {"update": {"state": ["failed", "preempted"][number], "train_step": 3}}}
        yield {"type": "exit", "exit": {"exit_code": 1}}

    monkeypatch.setattr(wandb_files, "_read_wandb_records", records)
    assert [each.name[-8:] for each in wandb_files.wandb_start_directories(parts[0])] == ["00000-x1"] * 2
    point = read_wandb_directory(parts[1])
    assert {step: row["loss"] for step, row in point.steps.items()} == {1: 3.0, 2: 2.0, 3: None}
    assert "blocks_s/worst" in point.steps[1] and not point.evaluations
    assert point.unfinished_state == "failed at step 3"


def test_wandb_directory_of_another_program_is_refused(run, monkeypatch, tmp_path, capsys):
    assert not is_wandb_directory(run[0]) and not is_wandb_directory(run[0] / "wandb")
    assert command_here(["compare", str(run[0] / "wandb")]) == 64
    assert f"name a run of W&B in it, such as {run[1]}" in capsys.readouterr().err
    assert command_here(["compare", str(run[1]), "--follow", f"to={tmp_path}"]) == 64
    assert "name its run.dir" in capsys.readouterr().err
    foreign = tmp_path / "offline-run-20260101_000000-x3"
    foreign.mkdir()
    (foreign / "run-x3.wandb").write_bytes(b"no such file")
    monkeypatch.setattr(wandb_files, "RETRY_AFTER_S", 0)
    with pytest.raises(ConfigError, match=r"leave this run out|not a run of shardtune"):
        read_wandb_directory(foreign)
    monkeypatch.setattr(wandb_files, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install"):
        read_wandb_directory(run[1])


def test_a_run_is_compared_though_wandb_fails_to_read_its_files_at_first(monkeypatch, tmp_path):
    """The command's answers are made up: what ends it with 1 on a busy machine could not be repeated."""
    line = json.dumps({"num": 1, "type": "exit", "exit": {"exit_code": 0}})
    answers = [(1, "", "Error: no idea"), (0, line, "")]
    environments = []

    def run(command, *, env, **_):
        environments.append(env)
        returncode, stdout, stderr = answers[len(environments) - 1]
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    monkeypatch.setattr(wandb_files.subprocess, "run", run)
    monkeypatch.setattr(wandb_files, "RETRY_AFTER_S", 0)
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/gone")
    monkeypatch.setenv("WANDB_DIR", "theirs")
    assert list(wandb_files._read_wandb_records(tmp_path, [])) == [json.loads(line)]
    assert [("WANDB_SERVICE" in env, env["WANDB_DIR"]) for env in environments] == [(False, "theirs")] * 2
    environments.clear()
    answers[1] = answers[0]
    with pytest.raises(ConfigError, match=r"cannot read its files \(Error: no idea\); leave this run out"):
        list(wandb_files._read_wandb_records(tmp_path, []))
    assert len(environments) == 2
    # What was read before a failure is kept, and the comparison says that the rest is missing.
    environments.clear()
    answers[:] = [(1, line, "Error: no idea")] * 2
    damage: list[str] = []
    assert list(wandb_files._read_wandb_records(tmp_path, damage)) == [json.loads(line)]
    assert len(damage) == 1


@pytest.fixture
def server(run, monkeypatch):
    """Stands for W&B's public API, with a run as its offline files have it, and a key."""
    return serving(run[1], monkeypatch)


def serving(part, monkeypatch):
    records = list(wandb_files._read_wandb_records(part, []))
    config = next(each["run"]["config"]["update"] for each in records if each["type"] == "run")
    summary = {}
    for each in records:
        summary |= each["summary"].get("update", {}) if each["type"] == "summary" else {}
    rows = [each["history"]["item"] for each in records if each["type"] == "history"]
    every = dict.fromkeys(key for row in rows for key in row)
    has = SimpleNamespace(
        config=config | {"_wandb": {}}, summary_metrics=summary, state="finished", created_at="2026-11-26T20:03:04Z"
    )
    has.scan_history = lambda **_: iter([every | row for row in rows])

    class Api:
        def __init__(self, timeout):
            pass

        def run(self, path):
            if path != "team/project/x1":
                raise wandb.errors.CommError(f"Could not find run <Run {path} (not found)>")
            return has

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(wandb_server, "unreachable_reason", lambda _: None)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return has


def test_wandb_server_has_what_the_run_directory_has(run, server, tmp_path, capsys):
    ours, theirs = read_recorded_run(run[0]), read_from_wandb_server(Path("wandb:team/project/x1"))
    assert theirs.steps == ours.steps and theirs.evaluations == ours.evaluations
    assert setting_differences([ours, theirs]) == [] and theirs.unfinished_state is None
    page = "https://wandb.ai/team/project/runs/x1?nw=nwuser"
    assert command_here(["compare", str(run[0]), page, f"to={tmp_path / 'answer'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "same loss as run, to the last digit over 4 steps" in said and "what differs" not in said
    assert "wandb:team/project/x1" in (tmp_path / "answer/compare.md").read_text()
    before = sorted(Path.cwd().iterdir())
    assert command_here(["compare", "wandb:team/project/x1"]) == 0
    assert sorted(Path.cwd().iterdir()) == before, "no page is written beside a run that is elsewhere"


def test_wandb_server_with_earlier_names_has_what_the_run_directory_has(earlier, monkeypatch):
    has = serving(earlier, monkeypatch)
    ours, theirs = read_recorded_run(Path("run")), read_from_wandb_server(Path("wandb:team/project/x1"))
    assert theirs.steps == ours.steps and theirs.evaluations == ours.evaluations and theirs.record.metric_names == 1
    has.config = has.config | {"metric_names": 4}
    with pytest.raises(
        ConfigError, match=r"edition 4, and this shardtune knows editions up to 3: use a later shardtune"
    ):
        read_from_wandb_server(Path("wandb:team/project/x1"))


@pytest.mark.parametrize(
    ("state", "ended"), [("running", "running at step 4"), ("crashed", "failed at step 4"), ("finished", None)]
)
def test_how_a_run_on_the_server_ended(server, state, ended):
    server.state = state
    server.summary_metrics = server.summary_metrics | {"state": "failed" if state == "crashed" else ""}
    assert read_from_wandb_server(Path("wandb:team/project/x1")).unfinished_state == ended


def test_wandb_server_errors_are_reported(server, monkeypatch, capsys):
    def said(word):
        assert command_here(["compare", word]) == 64
        return capsys.readouterr().err

    assert "does not give it (Could not find run" in said("wandb:team/project/x2")
    assert "names no run; write wandb:<entity>/<project>/<run id>" in said("wandb:team/x1")
    assert wandb_address("runs/wandb") is None
    server.config = {"lr": 1}
    assert "wandb:team/project/x1: not a run of shardtune" in said("wandb:team/project/x1")
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb_server, "wandb_server_address", lambda: "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached: Connection refused; the run's directory" in said(
        "wandb:team/project/x1"
    )
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr(wandb, "api", SimpleNamespace(api_key=None))
    assert "no W&B API key is configured" in said("wandb:team/project/x1")
