"""`shardtune train` with experts spread over two ranks, from the start screen to the export, beside a run of one process."""

import contextlib
import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from launch.plan.from_run import _measured_imbalance
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment, command_here
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import command_warm
from trainer.reporting import expert_load
from trainer.reporting.run_record import read_run_record

EXPERTS, RANKS = 8, 2
HALF, WHOLE = 2, 4
"""Steps of the run with expert parallelism, and of the one that goes on from it without."""
EXACT = 1e-5


class Site:
    """The runs of this file, in one directory."""

    def __init__(self, root):
        self.root = root
        self.base = model_dir(root, "qwen3_moe", num_experts=EXPERTS)
        write_chat_data(root / "train.jsonl", 32)
        write_chat_data(root / "eval.jsonl", 6, seed=1)

    def words(self, run, *more):
        """The command of one run. `eps` keeps Adam from taking whole steps for gradients that are only rounding."""
        settings = {
            "run.dir": self.root / run,
            "model.path": self.base,
            "data.path": self.root / "train.jsonl",
            "data.eval_path": self.root / "eval.jsonl",
            "data.cache_dir": self.root / "cache",
            "run.device": "cpu",
            "batch.global": 8,
            "optim.lr": 1e-3,
            "optim.eps": 1e-5,
            "schedule": "constant",
            "schedule.warmup_steps": 0,
            "checkpoint.every_steps": HALF,
            "logging.every_steps": 1,
            "logging.wandb": "disabled",
            "export.verify": "false",
        }
        return ["train", *(f"{key}={value}" for key, value in settings.items()), *more]

    def rows(self, run):
        lines = (self.root / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, run):
        return [row for row in self.rows(run) if "loss" in row]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Three runs: of one process; with expert parallelism over two ranks, for half the steps; from there without, to the end."""
    found = Site(tmp_path_factory.mktemp("experts"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in clean_environment().items():
            patch.setenv(key, value)
        found.tokens = []

        def noted(tokens, expert_ranks=1):
            found.tokens.append(tokens.clone())
            return right(tokens, expert_ranks)

        right = expert_load.expert_metrics
        with mock.patch.object(expert_load, "expert_metrics", noted):
            alone = ["strategy=single", "launcher.processes=1", "batch.micro=8", f"budget.steps={WHOLE}"]
            assert command_here(found.words("alone", *alone)) == 0
        two = ["strategy=fsdp2", f"launcher.processes={RANKS}", "batch.micro=2"]
        spread = found.words("spread", *two, f"parallel.experts={RANKS}", f"budget.steps={HALF}")
        with (found.root / "screen").open("w") as screen, contextlib.redirect_stdout(screen):
            assert command_warm(spread) == 0
        checkpoint = found.root / "spread" / "checkpoints" / f"step-{HALF:06d}"
        assert command_warm(found.words("on", *two, f"run.resume={checkpoint}", f"budget.steps={WHOLE}")) == 0
        yield found


def test_rows_of_a_run_with_expert_parallelism_are_those_of_one_process(site):
    """Also those of the run that goes on from its checkpoint with all experts on each rank."""
    expected = site.steps("alone")
    found = [*site.steps("spread"), *site.steps("on")]
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, WHOLE + 1))
    for mine, right in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(right[name], rel=EXACT)
        assert mine["tokens"] == right["tokens"]
    # One evaluation before the first step, and one after the last.
    first, *_ = (row["eval/loss"] for row in site.rows("spread") if "eval/loss" in row)
    *_, last = (row["eval/loss"] for row in site.rows("on") if "eval/loss" in row)
    right_first, *_, right_last = (row["eval/loss"] for row in site.rows("alone") if "eval/loss" in row)
    assert [first, last] == pytest.approx([right_first, right_last], rel=EXACT)
    assert abs(first - last) > 1e-3, "it learns nothing: the comparison is blind"


def test_load_of_experts_in_the_files_is_that_of_one_process(site):
    """The load of ranks is computed here from the tokens that each expert got in the run of one process."""
    assert len(site.tokens) == WHOLE
    for mine, right, tokens in zip(site.steps("spread"), site.steps("alone"), site.tokens, strict=False):
        assert mine["experts/max_over_mean"] == right["experts/max_over_mean"] > 1
        assert mine["experts/unused"] == right["experts/unused"]
        assert "experts/rank_max_over_mean" not in right
        assert mine["experts/rank_max_over_mean"] == pytest.approx(max(busiest_over_mean(tokens)))
    # In run.json, of the last logging interval.
    record = read_run_record(site.root / "spread")
    assert record.outcome is not None
    by_layer = [layer["rank_max_over_mean"] for layer in record.outcome.experts]
    assert by_layer == pytest.approx(busiest_over_mean(site.tokens[HALF - 1]))
    imbalance = _measured_imbalance(record, RANKS)
    assert imbalance is not None
    assert (imbalance.busiest_over_mean, imbalance.expert_ranks) == (max(by_layer), RANKS)


def busiest_over_mean(tokens):
    """By layer: tokens at the rank that got most, over the mean of both ranks."""
    found = []
    for layer in tokens.tolist():
        halves = [sum(layer[: EXPERTS // 2]), sum(layer[EXPERTS // 2 :])]
        found.append(max(halves) / (sum(halves) / RANKS))
    return found


def test_start_screen_and_record_say_how_experts_are_spread(site):
    lines = [
        "experts: 2 layers of 8 are distributed over 2 ranks (parallel.experts); each rank holds 4 of a layer",
        "each token goes to its 2 experts and back: about ",
    ]
    screen = (site.root / "screen").read_text()
    record = json.loads((site.root / "spread" / "run.json").read_text())
    assert len(record["dealt_experts"]) == 2
    for line, start in zip(record["dealt_experts"], lines, strict=True):
        assert line.startswith(start)
        assert line in screen
    assert record["world_size"] == RANKS
    total = sum(tensor.numel() for tensor in load_file(site.base / "model.safetensors").values())
    assert record["sharding"]["parameters"] == total
    assert sum(record["sharding"]["held_per_rank"]) == total
    assert json.loads((site.root / "on" / "run.json").read_text()).get("dealt_experts") is None


def test_exports_are_those_of_one_process(site):
    """After half of the steps, written by the run with expert parallelism; and at the end."""
    half = site.root / "half"
    assert command_here(["export", str(site.root / "alone"), f"checkpoint={HALF}", f"to={half}"]) == 0
    base = load_file(site.base / "model.safetensors")
    for mine, right in (
        (site.root / "spread" / "export", half),
        (site.root / "on" / "export", site.root / "alone" / "export"),
    ):
        found, expected = load_file(mine / "model.safetensors"), load_file(right / "model.safetensors")
        assert found.keys() == expected.keys() == base.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        moved = max(float((found[name] - base[name]).abs().max()) for name in base if ".experts." in name)
        assert moved > 1e-4, "experts have not been trained"
        assert (mine / "config.json").read_bytes() == (right / "config.json").read_bytes()
