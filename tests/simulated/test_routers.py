"""What routers add to the loss, on simulated GPUs."""

from dataclasses import replace

from strategies.base import Fsdp2Config, Precision
from strategies.runtime import SIMULATED
from strategies.simulation import simulated_rank
from tests.helpers.building import model_dir, run_config
from trainer.model.config import ModelConfig
from trainer.planner.simulate import simulate
from trainer.planner.simulation import build_step_parts


def test_router_look_ahead_costs_one_small_reduction_and_no_wait_on_many_gpus(tmp_path):
    model = model_dir(tmp_path, "mixtral")
    found = []
    for words in ({}, {"router_aux_loss": 0.5}):
        batch = {"global": 2 * 2 * 4, "micro": 2}
        config = run_config(model, Fsdp2Config(), "full", micro=2, precision=Precision.bf16, batch=batch)
        config = replace(config, model=ModelConfig(path=str(model), **words))
        with simulated_rank(0, 4, local_world_size=4, device=SIMULATED) as rank:
            found.append(simulate(build_step_parts(config, [40, 24], rank), rank))
    plain, balanced = found
    names = [[each.name for each in step.collectives if "int64" in each.dtype] for step in found]
    assert len(names[0]) == 0 and len(names[1]) == 1, "what routers choose is added up once a step"
    assert sum(balanced.host_reads.values()) == sum(plain.host_reads.values())
