"""A run as a chain of jobs: its scripts, its submission, a part that fails; on stand-ins, and once on a real SLURM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import pipeline, pipeline_part
from launch.main import main
from launch.runs.pipeline_jobs import pipeline_parts
from launch.runs.queue import read_queue
from tests.helpers.covering import whole
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.launch.runs.made import made, stand_in_for_squeue
from tests.slurm.cluster import Cluster
from trainer.config.launching import launcher_problems
from trainer.config.run import RunConfig, SlurmConfig
from trainer.model.config import ModelConfig
from trainer.tuning.base import LoraConfig

CLONE = Path(__file__).parents[2]
ALL = "launcher.pipeline=[prepare,train,evaluate,export]"
PARTS_BESIDE_TRAINING = ("whole-prepare-", "whole-evaluate-", "whole-export-")
SBATCH = """#!/bin/sh
echo "$@" >>{0}/asked
case "$*" in *"$REFUSE.sbatch") echo 'no such account' >&2; exit 1;; esac
wc -l <{0}/asked
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, data, and commands of SLURM that count and note what they are asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("sinfo", "#!/bin/sh\nexit 1\n"),
        ("sbatch", SBATCH.format(tmp_path)),
        ("scancel", f'#!/bin/sh\necho "$@" >{tmp_path}/cancelled\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("REFUSE", "nothing")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    return tmp_path


def submit(site: Path, *more: str) -> int:
    words = [
        f"model.path={site / 'model'}",
        f"data.path={site / 'data.jsonl'}",
        "data.eval_share=0.1",
        "budget.steps=3",
    ]
    words += ["launcher.nodes=2", "launcher.gpus_per_node=4", "launcher.partition=gpu", "launcher.cpu_partition=cpu"]
    words += ["launcher.cpus_per_task=32"]
    words += ["strategy=fsdp2", "batch.micro=1", f"run.dir={site / 'run'}", "launcher.part_options.prepare=[--mem=9G]"]
    return main(["submit", *words, ALL, *more])


def options(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M))


def test_pipeline_part_follows_the_one_before_and_asks_for_what_it_needs(site, capsys):
    assert submit(site) == 0
    asked = [line.split() for line in (site / "asked").read_text().splitlines()]
    assert [Path(words[-1]).name for words in asked] == [
        f"{p}.sbatch" for p in ("prepare", "train", "evaluate", "export")
    ]
    assert [words[1:-1] for words in asked] == [
        [],
        *[[f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"] for number in (1, 2, 3)],
    ]
    said = capsys.readouterr().out
    rows = [line.split()[:5] for line in said.splitlines()]
    assert ["1", "prepare", "1", "-", "cpu"] in rows, said
    assert ["2", "train", "2", "8", "gpu"] in rows, said
    assert ["4", "export", "1", "-", "cpu"] in rows, said
    found = {part: options(site / "run" / f"{part}.sbatch") for part in ("prepare", "train", "evaluate", "export")}
    assert {part: (each["nodes"], each.get("gpus-per-node"), each["partition"]) for part, each in found.items()} == {
        "prepare": ("1", None, "cpu"),
        "train": ("2", "4", "gpu"),
        "evaluate": ("1", "4", "gpu"),
        "export": ("1", None, "cpu"),
    }
    assert found["prepare"]["mem"] == "9G" and "mem" not in found["train"]
    # The export's own: not the CPUs and the memory of the nodes that train.
    assert found["export"]["cpus-per-task"] == "1" and found["export"]["mem"] == "3G"
    assert found["train"]["cpus-per-task"] == "32"
    assert "signal" in found["train"] and "signal" not in found["evaluate"]  # nobody there would take it
    for part in found:
        done = subprocess.run(["bash", "-n", site / "run" / f"{part}.sbatch"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((site / "run/pipeline.json").read_text())[2] == {"part": "evaluate", "job": "3"}


def test_export_part_asks_for_the_cores_and_the_memory_of_its_processes(site, tmp_path):
    """By a base of 40 GiB whose files are holes: headers alone are read."""
    base = tmp_path / "large"
    base.mkdir()
    layers = 40
    for layer in range(layers):
        name, elements = f"model.layers.{layer}.mlp.up_proj.weight", 2**29
        entry = {name: {"dtype": "BF16", "shape": [2**15, 2**14], "data_offsets": [0, 2 * elements]}}
        header = json.dumps(entry).encode()
        with (base / f"model-{layer}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * elements)
    config = RunConfig(model=ModelConfig(path=str(base)), launcher=SlurmConfig(mem="900G", cpus_per_task=64))
    found = pipeline.part_settings(config, "export", site)
    # Files of 5 GiB; a layer in float32 is 2 GiB, and what is made of it another 2.
    assert (found.processes, found.cpus_per_task, found.mem) == (8, 8, f"{8 * (2 + 5 + 4)}G")
    config.export.verify = True
    assert pipeline.part_settings(config, "export", site).mem == f"{8 * (2 + 5 + 4) + layers * 2}G"
    config.launcher.extra = ["--mem-per-cpu=4G", "--comment=mine"]  # of which sbatch takes no second one
    found = pipeline.part_settings(config, "export", site)
    assert (found.extra, found.mem) == (["--comment=mine"], f"{8 * (2 + 5 + 4) + layers * 2}G")
    config.launcher.part_options = {"export": ["--mem-per-cpu 20G"]}
    found = pipeline.part_settings(config, "export", site)
    assert (found.extra, found.mem) == (["--comment=mine", "--mem-per-cpu 20G"], None)
    config.launcher.part_options = {}
    config.tuning = LoraConfig()
    config.export.verify = False
    adapter = pipeline.part_settings(config, "export", site)
    assert (adapter.processes, adapter.mem) == (1, "10G")
    config.model.path = "some/repository"  # that is not on this host
    assert pipeline.part_settings(config, "export", site).mem == "900G"


def test_pipeline_print_shows_all_scripts_and_writes_nothing(site, capsys):
    for flag in ("--print", "--dry-run"):
        assert submit(site, flag) == 0
        said = capsys.readouterr().out
        assert said.count("#!/bin/bash") == 4 and not (site / "run").exists() and not (site / "asked").exists()
        assert (
            "# ---- export: sbatch --dependency=afterok:<job of evaluate> --kill-on-invalid-dep=yes export.sbatch"
            in said
        )


def test_pipeline_part_that_sbatch_refuses_cancels_the_others(site, capsys, monkeypatch):
    monkeypatch.setenv("REFUSE", "evaluate")
    assert submit(site) == 64
    assert (site / "cancelled").read_text().split() == ["1", "2"]
    said = capsys.readouterr().err
    assert "evaluate: sbatch refused" in said and "no such account" in said and "nothing was submitted" in said
    assert not (site / "run/pipeline.json").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["train", "prepare"], "in this order"),
        (["prepare", "export"], "must be train and others"),
        (["train", "train"], "each once"),
        (["train", "evaluate"], "nothing to evaluate; give data.eval_path"),
    ],
)
def test_chains_that_make_no_sense_are_refused(asked, said):
    found = list(launcher_problems(RunConfig(launcher=SlurmConfig(pipeline=asked))))
    assert len(found) == 1 and said in found[0], found


def test_pipeline_status_says_which_part_failed_and_what_became_of_the_rest(tmp_path, monkeypatch, capsys):
    run = made(tmp_path, "run", state=None, steps=0)
    parts = ("prepare", "train", "evaluate")
    (run / "pipeline.json").write_text(json.dumps([{"part": part, "job": str(17 + i)} for i, part in enumerate(parts)]))
    row = ["18", "18", "PENDING", "Dependency", "N/A", "1:00", "", str(tmp_path), "run", f"{run}/train.sbatch"]
    later = [
        "19",
        "19",
        "PENDING",
        "Dependency",
        "N/A",
        "1:00",
        "",
        str(tmp_path),
        "run-evaluate",
        f"{run}/evaluate.sbatch",
    ]
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "tools", [row, later]))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert [part.state for part in pipeline_parts(run, read_queue())] == [
        "failed",
        "queued",
        "queued",
    ]  # the first left no word
    pipeline_part.record_part_end("prepare", run, 0)
    assert [part.state for part in pipeline_parts(run, read_queue())] == ["done", "queued", "queued"]
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "queued" in said and "waits for another job" in said and "other jobs of yours" not in said
    pipeline_part.record_part_end("prepare", run, 65)
    stand_in_for_squeue(tmp_path / "tools", [])
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "prepare   job 17: failed with exit code 65" in said
    assert said.count("cancelled, since one before it failed") == 2 and f"shardtune logs {run} job=17" in " ".join(
        said.split()
    )
    assert main(["status", str(tmp_path), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)["runs"]
    assert (told["state"], [part["state"] for part in told["parts"]]) == (
        "failed",
        ["failed", "cancelled", "cancelled"],
    )
    monkeypatch.setenv("SLURM_JOB_ID", "20")  # submitted again
    (run / "pipeline.json").write_text('[{"part": "prepare", "job": "20"}, {"part": "train", "job": "21"}]')
    pipeline_part.record_part_end("prepare", run, 0)
    assert [part.state for part in pipeline_parts(run, read_queue())] == ["done", "failed"]


@pytest.mark.slurm
@whole("what SLURM is asked and what becomes of parts that fail is shown above")
def test_a_chain_on_a_real_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """A part that fails takes the rest out of the queue; a chain that does not fail goes to its end."""
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 24)
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    words = [
        f"model.path={tmp_path / 'model'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "strategy=ddp",
        "run.device=cpu",
    ]
    words += ["data.eval_share=0.25", "budget.steps=2", "batch.global=4", "batch.micro=1", "launcher.nodes=2"]
    words += ["logging.wandb=disabled", "launcher.preflight=none", ALL, "launcher.cpus_per_task=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def shardtune(*typed: str) -> str:
        return cluster.on("ctl", sys.executable, "-m", "launch.main", *typed, cwd=CLONE, env=env).stdout

    def chain(source: Path, run: Path) -> list[dict]:
        said = shardtune("submit", *words, f"data.path={source}", f"run.dir={run}")
        jobs = [
            line.split()[0] for line in said.splitlines() if re.match(r"\d+ +(prepare|train|evaluate|export) ", line)
        ]
        assert len(jobs) == 4, said
        cluster.wait(jobs[-1], 240)
        return json.loads(shardtune("status", str(run), "--json"))["runs"][0]["parts"]

    found = chain(tmp_path / "bad.jsonl", tmp_path / "broken")
    assert [part["state"] for part in found] == ["failed", "cancelled", "cancelled", "cancelled"], found
    assert found[0]["description"] == "failed with exit code 65"
    found = chain(data, tmp_path / "whole")
    assert [part["state"] for part in found] == ["done"] * 4, found
    assert (tmp_path / "whole/evaluation.json").exists() and (tmp_path / "whole/export/config.json").exists()
    logs = {path.name: path.read_text() for path in (tmp_path / "whole/logs").iterdir() if path.is_file()}
    of_export = "".join(text for name, text in logs.items() if name.startswith("whole-export-"))
    of_training = "".join(text for name, text in logs.items() if not name.startswith(PARTS_BESIDE_TRAINING))
    assert "exporting" in of_export and f"model: {tmp_path / 'whole/export'}" in of_export
    assert "step 2/2" in of_training, of_training
    assert "by the export job of this pipeline" in of_training, "the GPUs wait for no export"
