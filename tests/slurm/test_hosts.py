"""Two hosts without SLURM, in network namespaces, whose own names mean 127.0.1.1 to themselves and nothing to each other."""

import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.covering import whole
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import NET, Cluster

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
ENV = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


@whole("ranks of two nodes train in test_training.py")
def test_the_words_of_the_documentation_train_on_two_hosts(cluster: Cluster, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 16)
    words = [
        f"model.path={tmp_path / 'model'}",
        f"data.path={data}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "strategy=fsdp2",
    ]
    words += [
        "run.device=cpu",
        "batch.global=8",
        "batch.micro=2",
        "budget.steps=3",
        "logging.every_steps=1",
        f"run.dir={tmp_path / 'run'}",
    ]
    words += [
        "launcher.nodes=2",
        "launcher.processes=1",
        f"launcher.rdzv={NET}.1:29400",
        "logging.wandb=disabled",
        "logging.report=false",
    ]

    def start(node: str) -> str:
        own = f"laptop-of-{node}"
        (tmp_path / own).write_text(f"127.0.0.1 localhost\n127.0.1.1 {own}\n")
        # A host name and a file of names of its own; the network is the node's.
        train = shlex.join([sys.executable, "-m", "launch.main", "train", *words])
        script = f"hostname {own}; mount --bind {tmp_path / own} /etc/hosts; exec {train}"
        done = cluster.on(node, "unshare", "--uts", "--mount", "sh", "-c", script, cwd=CLONE, env=ENV, check=False)
        assert done.returncode == 0, f"{node}: {done.stdout}"
        return done.stdout

    with ThreadPoolExecutor(2) as both:
        said = list(both.map(start, ("n9", "n10")))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["world_size"] == 2, said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert run["host"] == "laptop-of-n9"  # rank 0, which writes the record, is where they meet
