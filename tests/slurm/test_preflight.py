"""The preflight on two SLURM nodes: fit ones, and one that is planted bad, which is named at once."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.covering import whole
from tests.helpers.models import tiny_model_dir
from tests.helpers.speed import seconds
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
ENV = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PYTHON": sys.executable}
BAD = 'if [ "$SLURMD_NODENAME" = n10 ]; then {}; fi'
"""A line of the set-up that is so on the second node alone."""


@whole("the job with a bad node shows it")
def test_preflight_on_slurm_passes_two_fit_nodes_and_names_bad_ones(cluster: Cluster, tmp_path: Path) -> None:
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}", f"run.dir={tmp_path / 'run'}"]

    def doctor(*more: str, code: int = 0) -> dict:
        command = [sys.executable, "-m", "launch.main", "doctor", "launcher=slurm", "launcher.nodes=2", *words, *more]
        done = cluster.on("ctl", *command, "--json", cwd=CLONE, env=ENV, check=False)
        assert done.returncode == code, done.stdout
        return json.loads(done.stdout[done.stdout.index("{") :])

    found = doctor("launcher.processes=2")
    assert [(node["host"], node["run_dir"]["sees"]) for node in found["nodes"]] == [("n9", True), ("n10", True)]
    assert found["problems"] == [] and found["fit"] and len({node["clone"]["digest"] for node in found["nodes"]}) == 1
    assert found["exchange"]["hosts"] == ["n9", "n9", "n10", "n10"] and found["exchange"]["all_reduce"] > 0
    assert [pair[:2] for pair in found["exchange"]["pairs"]] == [[0, 1]]
    assert not (tmp_path / "run" / "preflight").exists()

    setup = ["mkdir -p /run/other", f"mount --bind /run/other {tmp_path / 'run'}"]
    (tmp_path / "run").mkdir(exist_ok=True)
    line = BAD.format("unshare() { :; }; " + "; ".join(setup))
    found = doctor(f"launcher.setup=['{line}']", code=69)
    cluster.on("n10", "umount", str(tmp_path / "run"))
    [problem] = found["problems"]
    assert problem.startswith("n10: does not see run.dir=") and "a disk that all nodes share" in problem


def test_preflight_on_slurm_ends_a_job_with_a_bad_node_at_once_and_names_it(cluster: Cluster, tmp_path: Path) -> None:
    """Before, the other node waited for ten minutes, with empty logs."""
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = [
        f"model.path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        "budget.steps=2",
        "batch.global=4",
    ]
    words += ["strategy=ddp", "run.device=cpu", "batch.micro=1", "launcher.nodes=2", f"run.dir={tmp_path / 'run'}"]
    line = BAD.format("echo no module cuda; exit 3")
    command = [sys.executable, "-m", "launch.main", "submit", *words, f"launcher.setup=['{line}']"]
    job = cluster.on("ctl", *command, cwd=CLONE, env=ENV).stdout.split("submitted job ")[1].split(":")[0]
    began = time.monotonic()
    ended = cluster.wait(job)
    said = (tmp_path / "run" / "logs" / f"run-{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "69:0"), said
    assert "not started: n10: gave no answer: no module cuda" in said and "n9 " in said
    assert time.monotonic() - began < seconds(60)
