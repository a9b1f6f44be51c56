"""A model that is right for one document a batch only is trained so, or refused with the words that make it so."""

from dataclasses import replace

import pytest

from strategies import runtime as processes
from strategies.errors import ConfigError
from tests.helpers.building import alone, built_trainer, data_set, pair_set, run_config, take_steps
from tests.models import job
from trainer.objectives.preference import DpoConfig


@pytest.fixture
def runtime(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield alone(processes.join_job("cpu", timeout_s=60, threads=1))
    processes.leave_job()


def test_model_right_for_one_document_refuses_several_and_trains_one(tmp_path, runtime):
    model, data = tmp_path / "xlnet", data_set(tmp_path, uneven=True)
    job.made("xlnet", model, 0)
    config = run_config(model, "single", "full", micro=2)
    with pytest.raises(
        ConfigError, match=r"^batch.micro=2 and evaluation.batch=8: a xlnet .*set batch.micro=1 evaluation.batch=1$"
    ):
        built_trainer(config, data, runtime)
    one = replace(config, batch={"global": 2, "micro": 1}, evaluation=replace(config.evaluation, batch=1))
    losses = [loss for loss, _ in take_steps(built_trainer(one, data, runtime)[0], 2)]
    assert all(0 < loss < 10 for loss in losses)
    pairs = replace(one, objective=DpoConfig())
    with pytest.raises(ConfigError, match=r"objective=dpo: compares documents.*xlnet.*one at a time"):
        built_trainer(pairs, pair_set(tmp_path), runtime)
