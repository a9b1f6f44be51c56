"""A setting that the run resolves itself: its fields decide, its sentence is for people, and early sentences are still read."""

import json
from dataclasses import asdict, replace

import pytest

from strategies.matmul import Matmul
from trainer.config.run import (
    MATMUL_KEY,
    MICRO_BATCH_KEY,
    STRATEGY_KEY,
    RunConfig,
    requested_micro_batch,
    requested_strategy,
    settled_matmul,
)
from trainer.reporting.resolution import OutOfMemoryTrial, ResolvedSetting, parse_resolution
from trainer.reporting.shared_choice import agree_on_shared_choice

FITS = ResolvedSetting(
    MICRO_BATCH_KEY, "auto", 4, "planned 2.00 of 3.00 GiB", (OutOfMemoryTrial(16), OutOfMemoryTrial(8, step=3))
)


@pytest.mark.parametrize(
    ("resolution", "sentence"),
    [
        (FITS, "auto -> 4 (planned 2.00 of 3.00 GiB; 16 ran out of memory; 8 ran out of memory at step 3)"),
        (ResolvedSetting(STRATEGY_KEY, "auto", None, "", (OutOfMemoryTrial("ddp"),)), "auto (ddp ran out of memory)"),
        (ResolvedSetting(MATMUL_KEY, "auto", "blas", "as (this) run began"), "auto -> blas (as (this) run began)"),
        (ResolvedSetting("logging.entity", None, "a team", "WANDB_ENTITY"), "a team (WANDB_ENTITY)"),
        (ResolvedSetting("run.device", "auto", "cpu"), "auto -> cpu"),
    ],
)
def test_a_resolution_is_shown_as_a_sentence_and_read_back_from_its_fields(resolution, sentence):
    assert str(resolution) == sentence
    assert parse_resolution(resolution.setting, json.loads(json.dumps(asdict(resolution)))) == resolution


def test_a_sentence_of_an_early_run_directory_is_read():
    assert parse_resolution(MICRO_BATCH_KEY, str(FITS)) == FITS
    together = "auto -> 4 (planned 2.00 of 3.00 GiB; 16, 8 ran out of memory)"
    assert parse_resolution(MICRO_BATCH_KEY, together) == replace(
        FITS, tried=(OutOfMemoryTrial(16), OutOfMemoryTrial(8))
    )
    assert parse_resolution(MATMUL_KEY, "auto -> onednn (as this run began)").chosen == Matmul.onednn
    ran_out = parse_resolution(STRATEGY_KEY, "auto (ddp ran out of memory; zero1 ran out of memory)")
    assert [trial.choice for trial in ran_out.tried] == ["ddp", "zero1"] and ran_out.chosen is None


@pytest.mark.parametrize("note", [None, 7, [], {}, {"chosen": 1}, "auto -> as memory allows, where the GPUs are"])
def test_resolution_in_an_unknown_form_is_none(note):
    assert parse_resolution(MICRO_BATCH_KEY, note) is None


def test_resolution_fields_written_by_somebody_else_do_not_break_the_reader():
    stored = {"asked": "auto", "chosen": 2, "reason": None, "tried": ["8", {"choice": 4, "step": "x"}, {}]}
    assert [trial.choice for trial in parse_resolution(MICRO_BATCH_KEY, stored).tried] == ["8", 4, None]
    assert parse_resolution(MICRO_BATCH_KEY, {**stored, "tried": 3}).tried == ()


def test_resolution_is_decided_by_its_fields_and_not_by_its_wording(monkeypatch):
    """The same choices with every sentence in other words: what the run asked for and computes with stays the same."""
    monkeypatch.setattr(ResolvedSetting, "__str__", lambda resolution: f"{resolution.setting} was settled")
    monkeypatch.setattr(OutOfMemoryTrial, "__str__", lambda trial: "too large")
    settled = {
        MICRO_BATCH_KEY: FITS,
        STRATEGY_KEY: ResolvedSetting(STRATEGY_KEY, "auto", "zero2", "in other words"),
        MATMUL_KEY: ResolvedSetting(MATMUL_KEY, "auto", "blas", "in other words"),
    }
    config = RunConfig(substitutions=json.loads(json.dumps({key: asdict(note) for key, note in settled.items()})))
    assert config.substitutions == settled
    assert settled_matmul(config) is Matmul.blas
    assert requested_micro_batch({"micro": 4}, config.substitutions) == "auto"
    assert requested_micro_batch({"micro": 5}, config.substitutions) == 5  # typed since
    assert requested_strategy({"name": "zero2"}, config.substitutions) == {"name": "auto"}
    assert requested_strategy({"name": "ddp"}, config.substitutions) == {"name": "ddp"}


def test_resolution_is_shared_by_the_points_of_a_comparison_in_either_form(tmp_path):
    (tmp_path / "comparison.json").write_text("{}")
    choice = json.loads(json.dumps(asdict(ResolvedSetting(MATMUL_KEY, "auto", "blas", "here"))))
    assert agree_on_shared_choice(tmp_path / "first", MATMUL_KEY, choice) == choice
    assert agree_on_shared_choice(tmp_path / "second", MATMUL_KEY, {"asked": "auto", "chosen": "onednn"}) == choice
    (tmp_path / f"{MATMUL_KEY}.json").write_text(json.dumps({MATMUL_KEY: "auto -> onednn (elsewhere)"}))
    assert (
        parse_resolution(MATMUL_KEY, agree_on_shared_choice(tmp_path / "third", MATMUL_KEY, choice)).chosen == "onednn"
    )
