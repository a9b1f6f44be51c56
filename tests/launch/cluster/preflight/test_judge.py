"""What a preflight makes of what nodes say, and what a node says of its GPUs, model and disk, with stand-ins for the tools."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.preflight import coordinator
from launch.cluster.preflight.answer import preflight_json, report_text
from launch.cluster.preflight.coordinator import preflight_request
from launch.cluster.preflight.exchange import pairing_rounds
from launch.cluster.preflight.node import report_lines
from launch.cluster.preflight.node_facts import (
    DEVICE_VARIABLES,
    PreflightRequest,
    check_run_dir,
    gpu_facts,
    model_facts,
    node_facts,
)
from launch.cluster.preflight.verdict import FailedRank, NodeReports, judge_preflight
from trainer.config.resuming import settings_as_dict
from trainer.config.run import Preflight, RunConfig, RunSettings, SlurmConfig


def seen(node: int, **other: Any) -> dict[str, Any]:
    """What a fit node says."""
    return {
        "node": node,
        "host": f"n{node}",
        "time": 100.0,
        "heard_at": 100.5,
        "python": "3.11.7",
        "executable": "/env/bin/python",
        "clone": {"path": "/clone", "digest": "aaaa"},
        "packages": {"torch": "2.13.0", "peft": "0.21.0"},
        "cores": 8,
        "memory_free_gib": 60.0,
        "paths": {"data.jsonl": True},
        "models": {"llama": {"files": 5, "digest": "bbbb", "lacking": []}},
        "run_dir": {"sees": True, "problem": None, "free_gib": 100.0, "behind_s": 0.1},
        "gpus": [],
        "gpu_count": 0,
        "gpu_processes": [],
        **other,
    }


def judged(*looks: dict[str, Any], **asked: Any) -> tuple[list[str], list[str]]:
    heard = NodeReports([f"n{node}" for node in range(len(looks))], {each["node"]: each for each in looks})
    heard.visible_nodes = set(heard.facts)
    what = PreflightRequest(num_nodes=len(looks), run_dir="/runs/a", wants_communication_test=False)
    for key, value in asked.items():
        setattr(what, key, value)
    verdict = judge_preflight(what, heard)
    assert report_text(what, heard, verdict) and json.dumps(preflight_json(what, heard, verdict))
    return verdict.problems, verdict.notes


def test_fit_nodes_have_no_problems():
    assert judged(seen(0), seen(1), seen(2)) == ([], [])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"packages": {"torch": "2.12.0", "peft": "0.21.0"}},
            "n1: torch is 2.12.0, but 2.13.0 on n0; all nodes need the same",
        ),
        ({"packages": {"torch": "2.13.0"}}, "n1: peft is missing, but 0.21.0 on n0"),
        ({"packages": {}}, "n1: /env/bin/python has no torch"),
        ({"python": "3.12.1"}, "n1: Python is 3.12.1, but 3.11.7 on n0"),
        ({"clone": {"path": "/old", "digest": "cccc"}}, "n1: the code is cccc (/old), but aaaa on n0"),
        ({"run_dir": {"sees": False, "problem": None}}, "n1: does not see run.dir=/runs/a"),
        ({"run_dir": {"sees": True, "problem": "Read-only file system"}}, "cannot be written (Read-only file system)"),
        (
            {"run_dir": {"sees": True, "problem": None, "free_gib": 0.1, "behind_s": 0}},
            "n1: run.dir=/runs/a has 0.10 GiB free",
        ),
        ({"paths": {"data.jsonl": False}}, "n1: does not see data.jsonl"),
        ({"models": {"llama": {"files": 0, "digest": None}}}, "n1: does not have the model llama"),
        (
            {"models": {"llama": {"files": 4, "digest": "bbbb", "lacking": ["model-2.safetensors"]}}},
            "llama is incomplete",
        ),
        (
            {"models": {"llama": {"files": 5, "digest": "dddd", "lacking": []}}},
            "n1: the model llama is dddd, but bbbb on n0",
        ),
    ],
)
def test_preflight_names_the_node_that_differs_from_the_others(other, said):
    problems, _ = judged(seen(0), seen(1, **other), seen(2))
    assert problems and said in problems[0]
    assert not any(problem.startswith(("n0", "n2")) for problem in problems)


def test_preflight_refuses_a_node_with_too_little_memory_for_what_waits_there():
    problems, _ = judged(seen(0), seen(1, memory_free_gib=40.0), memory_gib=50.0)
    assert len(problems) == 1 and problems[0].startswith(
        "n1: has 40 GiB of memory free, and strategy.offload_activations"
    )
    assert judged(seen(0), seen(1, memory_free_gib=None), memory_gib=50.0)[0] == []


def test_preflight_notes_what_is_worth_knowing_and_no_problem():
    card = {"index": 0, "name": "H100", "ecc_errors": 2, "slowed": True, "used_mib": 30000, "clock_mhz": 1400}
    fast = {**card, "ecc_errors": 0, "slowed": False, "used_mib": 5, "clock_mhz": 1980}
    odd = {"gpus": [card], "gpu_count": 1, "gpu_processes": ["17 python 30000"], "time": 160.0}
    odd["run_dir"] = {"sees": True, "problem": None, "free_gib": 2.0, "behind_s": -60.0}
    more = {"gpus": [fast], "gpu_count": 1}
    problems, notes = judged(seen(0, **more), seen(1, **odd), seen(2, **more), gpus_per_node=1)
    said = " ".join(notes)
    assert problems == [] and all(note.startswith("n1: ") for note in notes)
    for part in (
        "has 2.0 GiB free",
        "its clock differs by +60 s from that of the run directory's disk",
        "its clock differs by +60 s from that of the other nodes",
        "2 memory errors that could not be corrected",
        "slowed down by its hardware",
        "other processes use 30000 MiB of GPU 0",
        "other processes are on its GPUs: 17 python 30000",
        "are limited to 1400 MHz, those of other nodes to 1980 MHz",
    ):
        assert part in said
    assert judged(seen(0, **more), seen(1), seen(2, **more), gpus_per_node=1)[0] == [
        "n1: has 0 GPUs, but 1 are needed (launcher.gpus_per_node, launcher.gres)"
    ]


def test_silent_nodes_failed_ranks_and_slow_links():
    heard = NodeReports(
        ["n0", "n1"], {0: seen(0)}, output_lines_by_node={1: ["bash: python9: not found"]}, visible_nodes={0}
    )
    asked = PreflightRequest(num_nodes=2)
    assert judge_preflight(asked, heard, is_final=False).problems == []
    assert judge_preflight(asked, heard).problems == ["n1: gave no answer: bash: python9: not found"]
    heard = NodeReports(
        ["n0", "n1"],
        {0: seen(0), 1: seen(1)},
        failed_ranks=[FailedRank(node=1, rank=1, error="refused")],
        visible_nodes={0},
    )
    assert judge_preflight(asked, heard).problems == [
        "n1: a file that it wrote into run.dir=None does not appear on n0; it must be on a disk that all nodes share"
    ]
    heard.visible_nodes = {0, 1}
    assert judge_preflight(asked, heard).problems == ["n1: rank 1 could not communicate with the other ranks: refused"]
    pairs = [(0, 1, 10.0), (0, 2, 10.0), (1, 2, 3.0), (0, 3, 10.0), (1, 3, 9.0), (2, 3, 2.0)]
    exchange = {"backend": "gloo", "ranks": 4, "all_reduce": 1.0, "all_gather": 1.0, "pairs": pairs}
    heard = NodeReports(
        [], {node: seen(node) for node in range(4)}, communication_rates=exchange, visible_nodes={0, 1, 2, 3}
    )
    verdict = judge_preflight(PreflightRequest(num_nodes=4), heard)
    assert verdict.problems == [] and verdict.notes == [
        "n2: reaches 3.00 GB/s with another node, and 9.50 GB/s is usual here"
    ]
    assert "between two nodes 2.00 to 10.00" in " ".join(
        report_text(PreflightRequest(num_nodes=4), heard, verdict).split()
    )


@pytest.mark.parametrize("nodes", [2, 3, 6, 7])
def test_every_pair_of_nodes_meets_once(nodes):
    found = pairing_rounds(nodes)
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(nodes), 2))
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in found)


def test_preflight_reports_of_nodes_are_read_complete_out_of_mixed_lines():
    """srun carries lines of several nodes in any order, each with its number before it."""
    asked = PreflightRequest(num_nodes=2)
    gathering = coordinator._ReportCollector(asked, NodeReports(["n0", "node 1"]))
    values = [{"node_facts": seen(node, environment={"NCCL": "x" * 3000})} for node in (0, 1)]
    lines = [
        [f"{node}: {line}" for line in report_lines(node, -1, value).splitlines()] for node, value in enumerate(values)
    ]
    assert all(len(line) < 1000 for each in lines for line in each) and len(lines[0]) > 3
    draw = random.Random(0)
    while any(lines):
        gathering.sort_line(None, draw.choice([each for each in lines if each]).pop(0))
    gathering.sort_line(None, "1: a warning of a library")
    gathering.sort_line(None, "srun: error: n1: task 1: Exited with exit code 1")
    assert {node: look["host"] for node, look in gathering.reports.facts.items()} == {0: "n0", 1: "n1"}
    assert gathering.reports.output_lines_by_node == {1: ["a warning of a library"]} and gathering.ended_nodes == {1}
    assert gathering.reports.hosts == ["n0", "n1"]  # srun knows its name


@pytest.mark.parametrize("answers", [True, False])
def test_preflight_does_not_blame_a_slow_node_for_one_that_ended_silently(monkeypatch, answers):
    """It was, three seconds after the other one had ended, and its row was missing."""
    monkeypatch.setattr(coordinator, "PATIENCE_AFTER_ERROR_S", 0.0)
    monkeypatch.setattr(coordinator, "PATIENCE_WHILE_UNANSWERED_S", 3600.0 if answers else 0.0)
    script = "echo no module cuda >&2; echo 'srun: error: n1: task 1: Exited with exit code 3' >&2; "
    script += f"sleep 0.5; echo '0: {report_lines(0, -1, {'node_facts': seen(0)}).strip()}'; " if answers else ""
    command = coordinator.NodeCommand(["bash", "-c", f"{script}sleep 60"], {"PATH": "/usr/bin:/bin"})
    heard, verdict = coordinator.run_preflight(
        PreflightRequest(num_nodes=2, wants_communication_test=False), [command], ["n0", "node 1"]
    )
    assert set(heard.facts) == ({0} if answers else set())
    assert verdict.problems == ["n1: gave no answer: no module cuda / srun: error: n1: task 1: Exited with exit code 3"]


SMI = """#!/bin/sh
case "$1" in
  *slowdown*) [ -z "$OLD" ] || { echo 'Field "clocks_throttle_reasons.hw_slowdown" is not a valid field to query.'; exit 2; }
    echo '0, NVIDIA H100, 81559, 12, 0, 1980, Not Active'; echo '1, NVIDIA H100, 81559, 40000, 3, 1980, Active' ;;
  *gpu*) [ -z "$ODD" ] || { echo '0, NVIDIA H100, 81559, [Insufficient Permissions], [N/A], [Unknown Error]'; exit; }
    echo '0, NVIDIA H100, 81559, 12, [N/A], 1980' ;;
  *compute-apps*) echo '4711, /usr/bin/python, 39000' ;;
esac
"""


def test_preflight_report_of_a_node_on_its_gpus(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = gpu_facts()
    assert [(gpu["ecc_errors"], gpu["slowed"], gpu["used_mib"]) for gpu in found["gpus"]] == [
        (0, False, 12),
        (3, True, 40000),
    ]
    assert (found["gpu_count"], found["gpu_processes"]) == (2, ["4711 /usr/bin/python 39000"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_facts()["gpu_count"] == 1
    monkeypatch.setenv("OLD", "1")  # a driver that does not know the field
    assert gpu_facts()["gpus"] == [
        {
            "index": 0,
            "name": "NVIDIA H100",
            "memory_mib": 81559,
            "used_mib": 12,
            "ecc_errors": None,
            "clock_mhz": 1980,
            "slowed": False,
        }
    ]
    monkeypatch.setenv("ODD", "1")  # a card that is cut up, or lost: what is said instead is no number
    odd = gpu_facts()
    assert [(gpu["used_mib"], gpu["clock_mhz"]) for gpu in odd["gpus"]] == [(None, None)]
    assert judged(seen(0, **odd), gpus_per_node=1)[0] == []


def test_cards_of_amd_are_counted(tmp_path, monkeypatch):
    """A node of theirs has no nvidia-smi, and every job on such nodes was refused for showing no GPUs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("launch.cluster.preflight.node_facts.AMD_GPUS_DIRECTORY", tmp_path)
    for number, (name, simd) in enumerate([("", 0), ("aldebaran", 440), ("aldebaran", 440)]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "name").write_text(f"{name}\n")
        (tmp_path / str(number) / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simd}\n")
    for variable in DEVICE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    found = gpu_facts()
    assert [gpu["name"] for gpu in found["gpus"]] == ["aldebaran", "aldebaran"] and found["gpu_count"] == 2
    assert judged(seen(0, **found), gpus_per_node=2) == ([], [])
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    assert gpu_facts()["gpu_count"] == 1


def test_preflight_report_of_a_node_on_model_data_and_disk(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model-1.safetensors").write_text("x")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = model_facts(str(model), None)
    assert (found["files"], found["lacking"]) == (2, ["model-2.safetensors"])
    (model / "model-1.safetensors").write_text("xy")
    assert model_facts(str(model), None)["digest"] != found["digest"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_facts("no-such/model-at-all", None)["files"] == 0
    place = tmp_path / "run" / "preflight" / "token"
    place.mkdir(parents=True)
    (place / "asked").touch()
    found = check_run_dir(tmp_path / "run", "token", 3)
    assert found["sees"] and found["free_gib"] > 0 and abs(found["behind_s"]) < 60 and (place / "3").exists()
    (tmp_path / "a.jsonl").touch()
    said = node_facts(PreflightRequest(data_paths=[str(tmp_path / "*.jsonl"), str(tmp_path / "*.csv")]), 0)
    assert (
        list(said["paths"].values()) == [True, False]
        and said["packages"]["torch"]
        and len(said["clone"]["digest"]) == 12
    )


def test_preflight_request_of_a_run(tmp_path):
    launcher = SlurmConfig(nodes=2, gpus_per_node=4, preflight=Preflight.nodes)
    config = RunConfig(launcher=launcher, run=RunSettings(dir="~/runs/a"))
    config.model.path, config.model.tokenizer = "org/model", "org/tokens"
    config.data.path = ["a.jsonl", "hub:org/data", "s3://bucket/b.jsonl"]
    asked = preflight_request(settings_as_dict(config), 2)
    assert (asked.ranks_per_node, asked.gpus_per_node, asked.data_paths) == (4, 4, ["a.jsonl"])
    assert not asked.wants_communication_test
    assert (asked.model, asked.tokenizer, asked.run_dir) == (
        "org/model",
        "org/tokens",
        str(Path("~/runs/a").expanduser()),
    )
    assert asked.memory_gib == 0.0
    (tmp_path / "config.json").write_text('{"hidden_size": 4096, "num_hidden_layers": 32}')
    config.model.path = str(tmp_path)
    config.strategy.offload_activations = True
    config.data.max_length = config.batch["micro"] = 1024
    # A block of a rank: 2^20 tokens x 4096 x 2 bytes = 8 GiB; four ranks of 32 blocks, and 3 GiB a process.
    assert preflight_request(settings_as_dict(config), 2).memory_gib == 4 * (32 * 8 + 3)
    config.model.download = True  # then nodes fetch it
    assert preflight_request(settings_as_dict(config), 2).model is None
