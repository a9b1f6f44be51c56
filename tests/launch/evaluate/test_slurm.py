"""`shardtune evaluate ... launcher=slurm`: its script, without a SLURM; and an evaluation that runs out of memory."""

import os
import re
import shlex
import subprocess

import pytest
import torch

from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from trainer.evaluation.generate import AnswerGenerator


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("submitted")
    model_dir(root)
    (root / "facts.jsonl").write_text('{"prompt": "hello?\\n", "completion": "world"}\n')
    task = ["evaluation.tasks.facts.kind=exact_match", f"evaluation.tasks.facts.path={root}/facts.jsonl"]
    return [f"model.path={root}/llama", *task, f"to={root}/it's here", f"data.cache_dir={root}/cache", "run.threads=1"]


def test_evaluate_slurm_script_gives_the_same_words_to_one_node(words, capsys):
    asked = [
        "launcher=slurm",
        "launcher.gpus_per_node=4",
        "strategy=fsdp2",
        "launcher.partition=gpu",
        "launcher.setup=[export A=b]",
    ]
    assert command_here(["evaluate", *words, *asked, "--json", "--print"]) == 0
    script = capsys.readouterr().out
    options = {k: shlex.split(v)[0] for k, v in re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M)}
    assert (options["gpus-per-node"], options["partition"], options["nodes"]) == ("4", "gpu", "1")
    shown = script.replace("\nexec ", "\nprintf '%s\\n' \"$A\" ")
    done = subprocess.run(["bash", "-euc", shown], text=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    said = done.stdout.splitlines()
    assert said[0] == "b" and said[2:5] == ["-m", "launch.main", "evaluate"], done.stderr
    assert said[5:] == [*words, "strategy=fsdp2", "--json", "launcher=local", "launcher.processes=4"]


def test_evaluate_slurm_job_is_submitted_and_refusals_of_sbatch_are_reported(words, tmp_path, capsys, monkeypatch):
    stub = tmp_path / "sbatch"
    stub.write_text('#!/bin/bash\ncp "$2" "$(dirname "$0")/given"\necho "17;here"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert command_here(["evaluate", *words, "launcher=slurm"]) == 0
    assert "submitted job 17" in capsys.readouterr().out
    assert "-m launch.main evaluate" in (tmp_path / "given").read_text()
    stub.write_text("#!/bin/bash\necho invalid partition >&2\nexit 1\n")
    assert command_here(["evaluate", *words, "launcher=slurm"]) == 64
    assert "invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["launcher=slurm", "launcher.nodes=2", "strategy=fsdp2", "--print"], "an evaluation is submitted to one node"),
        (["--print"], "add launcher=slurm"),
    ],
)
def test_evaluate_slurm_refuses_what_cannot_be_submitted(words, more, told, capsys):
    assert command_here(["evaluate", *words, *more]) == 64
    assert told in capsys.readouterr().err


def test_evaluate_out_of_memory_says_where_and_what_helps(words, capsys, monkeypatch):
    def answers(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(AnswerGenerator, "generate_answers", answers)
    assert command_here(["evaluate", *words]) == 69
    shown = capsys.readouterr().err
    assert "evaluation.tasks.facts: rank 0 on " in shown and "Tried to allocate 2 GiB" in shown
    assert "evaluation.batch below 8" in shown and "strategy=fsdp2 or zero3 on more ranks" in shown
    assert "Traceback" not in shown
