"""`train -m`: a run for each point, each in a directory of its own, and the table at the end."""

import json

from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
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
