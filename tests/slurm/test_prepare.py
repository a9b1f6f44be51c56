"""A job array prepares a corpus in parts on two nodes; the job that depends on it merges them into the same data set."""

import os
import sys
from pathlib import Path

import pytest

from launch.main import main
from tests.helpers.covering import whole
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@whole("shards without SLURM are in tests/data, arrays in test_signals.py")
def test_prepare_by_a_job_array_makes_the_same_data_set_as_one_call(
    cluster: Cluster, tmp_path: Path, monkeypatch, capsys
) -> None:
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 1500)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", "data.eval_share=0.1"]
    shared = [*words, f"data.cache_dir={tmp_path / 'shared'}"]
    out = f"--output={tmp_path}/%A_%a.out"
    array = cluster.sbatch(out, "--array=0-2", "slurm/prepare.sbatch", *shared, cwd=CLONE, env=ENV)
    merge = cluster.sbatch(
        f"--dependency=afterok:{array}",
        f"--output={tmp_path}/merge.out",
        "slurm/prepare.sbatch",
        *shared,
        cwd=CLONE,
        env=ENV,
    )
    said = lambda: "".join(p.read_text() for p in sorted(tmp_path.glob("*.out")))  # noqa: E731
    assert cluster.wait(merge, 240)["JobState"] == "COMPLETED", said()
    assert "shard 2 of 3: done" in said() and "train: 1,350 documents" in said()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert main(["prepare", *words, f"data.cache_dir={tmp_path / 'alone'}"]) == 0
    (alone,) = [path.parent for path in (tmp_path / "alone").glob("*/manifest.json")]
    merged = tmp_path / "shared" / alone.name
    for name in ("tokens.bin", "supervised.bin", "train/index.npy", "eval/index.npy", "documents.arrow"):
        assert (merged / name).read_bytes() == (alone / name).read_bytes(), name
