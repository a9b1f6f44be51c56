"""Settings are not shared: `from_config` keeps the config object it is given, so one model could switch another's attention."""

from dataclasses import asdict, replace

import pytest
import torch

from strategies import runtime as processes
from tests.helpers.building import GLOBAL_BATCH, alone, data_set, model_dir, run_config, trainer_for
from tests.helpers.methods import ADAPTERS
from trainer.data.config import DataConfig, Layout
from trainer.model.config import Attention


@pytest.fixture
def runtime(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield alone(processes.join_job("cpu", timeout_s=60, threads=1))
    processes.leave_job()


def loss_of(trainer) -> float:
    (batch,) = trainer.loader.steps(0, 1)
    with torch.no_grad():
        return float(trainer.engine.forward(batch.micro_batches[0], last=True)["loss"])


def test_model_settings_of_a_second_model_leave_the_first_alone(tmp_path, runtime):
    data = data_set(tmp_path, uneven=False)
    config = run_config(model_dir(tmp_path), "single", "lora", micro=GLOBAL_BATCH)
    first = trainer_for(config, data, runtime)
    before, implementation = loss_of(first), first.engine.step_module.model.config._attn_implementation
    other = replace(config, data=DataConfig(layout=Layout.padded))
    other = replace(other, model=replace(config.model, attention=Attention.eager, dropout=0.5))
    second = trainer_for(other, data, runtime)
    assert second.engine.step_module.model.config._attn_implementation == "eager" != implementation
    assert first.engine.step_module.model.config._attn_implementation == implementation
    assert loss_of(first) == before
    assert second.engine.step_module.model.config is not first.engine.step_module.model.config


@pytest.mark.parametrize("case", ["lora patterns", "ia3", "peft c3a"])
def test_model_settings_are_not_changed_by_building_nor_shared_by_two_runs(case, tmp_path, runtime):
    data = data_set(tmp_path, uneven=False)
    config = replace(run_config(model_dir(tmp_path), "single", "lora", micro=GLOBAL_BATCH), tuning=ADAPTERS[case][0])
    before = asdict(config)
    first, second = (trainer_for(config, data, runtime) for _ in range(2))
    assert asdict(config) == before
    one, two = (trainer.engine.step_module.model.peft_config["default"] for trainer in (first, second))
    assert one is not two and one.target_modules is not two.target_modules
