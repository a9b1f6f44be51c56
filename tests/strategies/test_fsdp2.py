"""What an engine keeps of the shards when FSDP2 puts others in their place."""

from dataclasses import replace

import pytest
import torch

from strategies import fsdp2
from strategies.base import Fsdp2Config
from strategies.simulation import simulated_rank
from tests.helpers.building import data_set, model_dir, run_config, trainer_for
from trainer.optim.config import AdamwConfig


@pytest.fixture
def pins(monkeypatch):
    """Memory from which a GPU copies, as torch pins it: in another place. Without a GPU it can pin none."""
    pinned, offload = [], fsdp2.CPUOffloadPolicy

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def is_pinned(tensor):
        return tensor.untyped_storage().data_ptr() in {each.untyped_storage().data_ptr() for each in pinned}

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    monkeypatch.setattr(fsdp2, "CPUOffloadPolicy", lambda pin_memory: offload(pin_memory=True))
    return pinned


def take(tmp_path, strategy, rank, ranks):
    """The engine after a forward pass, as one of several ranks: real tensors, exchanges that bring nothing."""
    config = run_config(model_dir(tmp_path), strategy, "full", micro=2, optim=AdamwConfig(lr=2e-5, ema_decay=0.9))
    with simulated_rank(rank, ranks, device=torch.device("cpu")) as runtime:
        config = replace(config, batch={"global": 2 * ranks, "micro": 2})
        trainer = trainer_for(config, data_set(tmp_path, uneven=False), runtime)
        batch = next(trainer.loader.steps(0, 1)).micro_batches[0]
        trainer.engine.forward(batch, last=True)
        return trainer.engine


def averaged_apart(engine):
    """Parameters of which the average watches another tensor than the one that is trained."""
    pairs = zip(engine.trainable, engine.weight_average.weights, strict=True)
    return [name for (name, parameter), seen in pairs if parameter.to_local().data_ptr() != seen.data_ptr()]


def test_an_average_watches_the_shards_of_a_rank_that_are_padded(tmp_path):
    engine = take(tmp_path, Fsdp2Config(), 2, 3)
    uneven = [p for _, p in engine.trainable if p.to_local().shape[0] != -(-p.shape[0] // 3)]
    assert uneven and averaged_apart(engine) == []


def test_an_average_watches_the_shards_that_are_pinned_on_the_host(tmp_path, pins):
    engine = take(tmp_path, Fsdp2Config(cpu_offload=True), 0, 1)
    assert len(pins) >= len(engine.trainable) and averaged_apart(engine) == []
