"""docs/evidence/expert-parallelism.md quotes what benchmarks/mixtures.py has planned, and the planner still plans it."""

import json

import pytest

from benchmarks.mixtures import DEGREE, QWEN, RESULTS, cost_model_of, crossover, sent_bytes
from tests.helpers.covering import whole
from tests.helpers.launching import ROOT

PAGE = (ROOT / "docs" / "evidence" / "expert-parallelism.md").read_text(encoding="utf-8")
PLANNED = json.loads(RESULTS.read_text(encoding="utf-8"))
RECOMPUTED = {"none": "no checkpointing", "full": "full checkpointing"}


def hundreds(tokens):
    """As the page writes a crossover: 4,900."""
    return f"{round(tokens, -2):,}"


def test_crossovers_of_the_page_are_those_that_were_planned():
    by_way = {(row["tuning"], row["recompute"]): row for row in PLANNED["crossover"]}
    assert len(by_way) == 4
    for tuning, name in (("full", "full tuning"), ("lora", "LoRA")):
        bytes_of = [hundreds(by_way[tuning, mode]["bytes"]) for mode in RECOMPUTED]
        assert f"| {name} | {bytes_of[0]} | {bytes_of[1]} |" in PAGE
        for mode, words in RECOMPUTED.items():
            row = by_way[tuning, mode]
            times = f"{hundreds(row['time_even'])} | {hundreds(row['time_twice'])}"
            assert f"| {name}, {words} | {times} |" in PAGE


def test_large_mixtures_of_the_page_are_those_that_were_planned():
    assert [(row["model"], row["experts"]) for row in PLANNED["large"]] == [
        (model, degree) for model in ("Kimi K2", "DeepSeek V3") for degree in (1, 8, 16)
    ]
    for row in PLANNED["large"]:
        place = "16, across two hosts" if row["experts"] == 16 else str(row["experts"])
        memory = f"{row['tensors_gib']} GiB"
        if not row["fits"]:
            memory += f", but the GPU has {row['card_gib']} GiB"
        worst = f"{row['worst_gib']} GiB" if "worst_gib" in row else ""
        seconds = f"{row['step_s']} s" if row["fits"] else "does not fit"
        cells = " | ".join((place, memory, worst, seconds)).replace("|  |", "| |")
        assert f"| {cells} |" in PAGE


@whole("its figures are those of the file, which the page quotes")
@pytest.mark.parametrize("row", PLANNED["crossover"], ids=lambda row: f"{row['tuning']}-{row['recompute']}")
def test_planner_still_plans_the_bytes_of_the_file(row):
    words = [f"model.path={QWEN}", f"tuning={row['tuning']}", f"strategy.activation_checkpointing={row['recompute']}"]
    models = [
        cost_model_of([*words, f"parallel.experts={degree}"], "h100_80g", 1, 4096, 1.0)[1] for degree in (1, DEGREE)
    ]
    assert crossover(sent_bytes, *models) == pytest.approx(row["bytes"], rel=1e-3)
