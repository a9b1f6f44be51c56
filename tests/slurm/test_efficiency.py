"""What a start of a job took, with sacct's answers as a real one gave them, and without accounting."""

import json
from pathlib import Path

import pytest

from launch.main import main
from launch.runs import efficiency
from tests.launch.runs.made import made

ENDED = """\
2|COMPLETED|83|00:35.848|||
2.batch|COMPLETED|83|00:00.583|1|13004K|cpu=00:00:00,energy=0,fs/disk=5388557,mem=13004K,pages=0,vmem=287968K
2.0|COMPLETED|80|00:35.265|2|676416K|cpu=00:00:03,energy=0,gres/gpumem=10G,gres/gpuutil=142,mem=676268K,pages=0
"""


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "bin" / "sacct"
    tool.parent.mkdir()
    (tmp_path / "answer").write_text(ENDED)
    tool.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\ncat {tmp_path}/answer\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setattr(efficiency, "SACCT_RETRY_S", 0)
    monkeypatch.setattr(efficiency.time, "time", lambda: 1000.0 + 3600)
    return tool


ENV = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "8200", "SLURM_MEM_PER_NODE": "2048", "SLURM_JOB_ID": "2"}


def test_efficiency_figures_of_a_job_are_recorded_and_shown(sacct, tmp_path, capsys, monkeypatch):
    run = made(tmp_path, "run", state="done")
    about = {"total_steps": 10, "world_size": 2, "device_name": "NVIDIA H100 80GB HBM3"}
    (run / "run.json").write_text(json.dumps(about))
    said = efficiency.record_start_usage(run, "2", 0, 0, {**ENV, "SLURM_JOB_NUM_NODES": "2"})
    # An hour of two; 35.265 of 160 CPU seconds; 2 GPUs for an hour at $3.99; 142 % of 200.
    assert (
        said
        == "job 2, start 0: 1:00:00 of 2:00:00 (50%), 22% of 2 CPUs, 0.645 of 2 GiB of a node, 2 GPUs 71% busy, $7.98"
    )
    assert "--jobs 2" in (tmp_path / "asked").read_text()
    efficiency.record_start_usage(run, "2", 1, 0, ENV)
    record = json.loads((run / "run.json").read_text())
    assert record | about == record and [start["start"] for start in record["jobs"]] == [0, 1]
    (run / "jobs.jsonl").open("a").write('{"job": "2", "sta')  # torn
    monkeypatch.undo()
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("used") == 2 and "71% busy, $7.98" in " ".join(shown.split())
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["starts"] == record["jobs"]


def test_efficiency_figures_that_slurm_does_not_know_are_named(sacct, tmp_path):
    run = made(tmp_path, "run")
    sacct.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    said = efficiency.record_start_usage(run, "2", 0, 1, ENV)
    assert said.startswith(
        "job 2, start 0: 1:00:00 of 2:00:00 (50%), sacct knows nothing (Slurm accounting storage is disabled)"
    )
    sacct.unlink()
    assert (
        "no sacct on this node" in efficiency.record_start_usage(run, "2", 0, 1, ENV) or Path("/usr/bin/sacct").exists()
    )
    assert efficiency.record_start_usage(tmp_path / "gone", "2", 0, 1, ENV).endswith(
        "not recorded (No such file or directory)"
    )
