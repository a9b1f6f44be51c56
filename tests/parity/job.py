"""Every strategy against `single`, in one process group a world size: `python -m tests.parity.job <dir> <set>`."""

import itertools
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from strategies import runtime as processes
from tests.helpers.building import GLOBAL_BATCH, alone, data_set, model_dir, run_config, take_steps, trainer_for
from trainer.model.quantisation import Quantisation

STEPS = 5


def names_for(world: int) -> list[str]:
    """The strategies that make sense at this world size."""
    return ["ddp", "fsdp2", "zero1", "zero2", "zero3"] + (["hsdp"] if world >= 4 else [])


def matrix(root: Path, runtime: processes.Runtime) -> dict:
    """{case: [(loss, grad norm) a step]} for the whole matrix and for its oracles."""
    model = model_dir(root)
    found = {}
    for tuning, uneven in itertools.product(("full", "lora"), (False, True)):
        data = data_set(root, uneven=uneven)
        masks = "uneven" if uneven else "even"
        oracle = trainer_for(run_config(model, "single", tuning, micro=GLOBAL_BATCH, steps=STEPS), data, alone(runtime))
        found[f"single-{tuning}-{masks}"] = _oracle_steps(oracle)
        for strategy, accumulation in itertools.product(names_for(runtime.world_size), (1, 4)):
            micro = GLOBAL_BATCH // (runtime.world_size * accumulation)
            trainer = trainer_for(run_config(model, strategy, tuning, micro=micro, steps=STEPS), data, runtime)
            assert trainer.loader.accumulation == accumulation
            found[f"{strategy}-{tuning}-{masks}-{accumulation}"] = take_steps(trainer, STEPS)
    found |= _through_sockets(model, data, runtime)
    if "hsdp" in names_for(runtime.world_size) and find_spec("bitsandbytes") is not None:
        found |= _quantised_hsdp(model, data, runtime)
    return found


def _through_sockets(model: Path, data, runtime: processes.Runtime) -> dict:
    """As ranks on several hosts would exchange: all above did through the memory of theirs."""
    found = {}
    for strategy in names_for(runtime.world_size):
        config = run_config(model, strategy, "full", micro=GLOBAL_BATCH // runtime.world_size, steps=STEPS)
        assert trainer_for(config, data, runtime).engine.host_memory is not None
        trainer = trainer_for(config, data, replace(runtime, shared_memory=False))
        assert trainer.engine.host_memory is None
        found[f"{strategy}-sockets"] = take_steps(trainer, STEPS)
    return found


def _quantised_hsdp(model: Path, data, runtime: processes.Runtime) -> dict:
    """The one strategy that the two ranks of `bases.py` cannot have."""
    found = {}
    for strategy, key, here in (("single", "single", alone(runtime)), ("hsdp", "hsdp", runtime)):
        config = run_config(model, strategy, "lora", micro=GLOBAL_BATCH // here.world_size, steps=STEPS)
        config = replace(config, model=replace(config.model, quantisation=Quantisation.nf4))
        trainer = trainer_for(config, data, here)
        found[f"{key}-nf4"] = _oracle_steps(trainer) if strategy == "single" else take_steps(trainer, STEPS)
    return found


def _oracle_steps(trainer) -> list[tuple[float, float]]:
    """As `take_steps`, without any communication: read the sums of this process alone."""
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        rows.append((float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)))
    return rows


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        model_dir(directory)
        for flag in (False, True):
            data_set(directory, uneven=flag)
    processes.barrier(here)
    result = matrix(directory, here)
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
