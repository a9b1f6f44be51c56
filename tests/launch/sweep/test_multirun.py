"""`train -m`: a run for each point, each in a directory of its own, the table at the end, and what shows the points in W&B."""

import base64
import json
import subprocess
import sys

import pytest

from tests.helpers.building import model_dir
from tests.helpers.covering import whole
from tests.helpers.launching import clean_environment
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.wandb_server import wandb_server
from tests.helpers.warm import command_warm


def test_points_are_runs_and_end_with_a_table(tmp_path, capfd):
    write_chat_data(tmp_path / "train.jsonl", 32)
    model_dir(tmp_path)
    shared = ["strategy=single", "debug=tiny", "run.device=cpu", "budget.steps=4", "optim.max_skipped_steps=2"]
    shared += [f"model.path={tmp_path / 'llama'}", f"data.path={tmp_path / 'train.jsonl'}", "logging.wandb=disabled"]
    shared += [f"data.cache_dir={tmp_path / 'cache'}", "data.eval_share=0.2", f"run.dir={tmp_path / 'sweep'}"]
    assert command_warm(["train", "-m", *shared, "optim.lr=1e-3,1e30"]) == 70
    out, _ = capfd.readouterr()
    *_, table, link = out.strip().split("\n\n")
    head, done, failed, *more = table.splitlines()
    assert head.split() == ["steps", "loss", "held-out", "tokens/s", "GiB", "point"]
    state, steps, loss, held_out, _, _, point = done.split()
    rows = [json.loads(line) for line in (tmp_path / "sweep/0/metrics.jsonl").read_text().splitlines()]
    assert (state, steps, point) == ("done", "4", "optim.lr=1e-3")
    assert loss == f"{[row['loss'] for row in rows if 'loss' in row][-1]:.4f}"
    assert held_out == f"{rows[-1]['eval/loss']:.4f}"
    assert failed.split()[0] == "failed" and failed.endswith("optim.lr=1e30")
    assert "not finite for 2 steps" in " ".join(" ".join(more).split())
    assert max(map(len, (head, done, failed, *more))) <= 80
    side_by_side, *not_in_wandb = link.splitlines()
    assert side_by_side == f"side by side: shardtune compare {tmp_path / 'sweep'}"
    assert " ".join(not_in_wandb).startswith("not in W&B: these runs were recorded with logging.wandb=disabled")
    written = [(tmp_path / "sweep" / str(n) / "config.yaml").read_text().split("lr: ")[1].split()[0] for n in (0, 1)]
    assert [float(rate) for rate in written] == [1e-3, 1e30]
    assert not (tmp_path / "sweep/2").exists()


@whole(
    "tests/launch/compare/test_page.py makes the script of runs that were written by hand; sends those of a comparison"
)
@pytest.mark.parametrize(
    ("axis", "more"),
    [("optim.lr=1e-3,2e-3", []), ("optim.lr=interval(1e-4,1e-2)", ["sweeper=optuna", "sweeper.trials=2"])],
    ids=["sweep", "search"],
)
def test_points_in_wandb_get_a_view_and_a_report(tmp_path, capfd, axis, more):
    """The script that a sweep and a search leave, run as a user runs it, against a stand-in that keeps what it sends."""
    pytest.importorskip("wandb_workspaces")
    data = write_chat_data(tmp_path / "train.jsonl", 32)
    words = [f"model.path={model_dir(tmp_path)}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += ["strategy=single", "run.device=cpu", "budget.steps=4", "batch.global=4", "batch.micro=4", axis, *more]
    words += [f"data.eval_path={data}", "logging.wandb=offline", "logging.report=false", "export.at_end=false"]
    points = tmp_path / "points"
    assert command_warm(["train", "-m", *words, f"run.dir={points}"]) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"in W&B: {points / 'workspace.py'} makes a view and a report of these runs there" in said
    ids = [next((points / number / "wandb").glob("offline-run-*")).name.rpartition("-")[2] for number in "01"]

    with wandb_server() as server:
        env = {**clean_environment(), **server.environment, "WANDB_SILENT": "true"}
        done = subprocess.run([sys.executable, str(points / "workspace.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (view,) = server.variables("UpsertView2")
    (report,) = server.variables("upsertView")
    assert (view["displayName"], report["type"]) == ("points", "runs/draft")
    section = json.loads(view["spec"])["section"]
    (runs,) = section["runSets"]
    (filtered,) = runs["filters"]["filters"]
    assert (filtered["key"]["name"], sorted(filtered["value"])) == ("name", sorted(ids))
    assert base64.b64decode(runs["baselineRunId"]).decode() == f"Run:v1:{ids[0]}:shardtune:us"
    questions = [each["name"] for each in section["panelBankConfig"]["sections"]]
    assert questions[0] == "Points" and "What does each need?" in questions
    blocks = json.loads(report["spec"])["blocks"]
    (table,) = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    rows = table.splitlines()
    assert rows[0].startswith("| run | lr | steps | loss |") and len(rows) == 2 + 2
