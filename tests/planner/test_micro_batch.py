"""`batch.micro=auto`: the largest that is planned to fit, tried by real steps, lowered where memory runs out, frozen once."""

import gc
import json
import re
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import yaml

from launch.compare.profiles import read_profile
from strategies.base import DdpConfig, Precision
from strategies.errors import DoesNotFit
from strategies.runtime import Runtime
from tests.helpers.building import STRATEGIES, TUNINGS, data_set, model_dir, run_config, trainer_for
from tests.helpers.covering import EVERYTHING
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import command_warm
from trainer.build.inputs import RunInputs
from trainer.config.run import MICRO_BATCH_KEY, Device, LauncherConfig
from trainer.model.loading import load_tokenizer
from trainer.planner import micro_batch as micro_module
from trainer.planner import oom_probe, simulation
from trainer.planner.fit_check import NotSimulated
from trainer.planner.hardware import GIB
from trainer.planner.lengths import micro_batch_divisors
from trainer.planner.micro_batch import (
    _trial_description,
    propose_micro_batch,
    resolve_micro_batch,
    with_proposed_micro_batch,
)
from trainer.planner.oom_probe import take_probe_steps
from trainer.planner.oom_report import is_out_of_memory
from trainer.planner.rank_devices import DeviceMemory, RankCounts
from trainer.planner.simulation import simulate_depth
from trainer.reporting.resolution import parse_resolution

CONTEXT = 0.75


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration that asks, data); the model is of a size whose activations count."""
    root = tmp_path_factory.mktemp("micro")
    path = model_dir(root, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    config = run_config(path, "single", "lora", micro="auto")
    return config, data_set(root, uneven=False)


@pytest.fixture
def given(made, runtime):
    config, data = made
    return RunInputs(load_tokenizer(config.model), data, Precision.fp32, runtime)


def at_once(monkeypatch):
    """Simulations in this process, and once: the same form for every memory."""
    known = {}

    def answered(ask, given, patience_s):
        key = str(given)
        if key not in known:
            known[key] = ask(*given)
        return known[key]

    monkeypatch.setattr(micro_module, "call_in_process", answered)


def test_micro_batch_proposed_is_the_largest_that_fits(made, monkeypatch):
    """As the simulation of each micro-batch itself says, which knows nothing of forms."""
    config, data = made
    at_once(monkeypatch)
    needed = {}
    for micro in (4, 8):
        lengths = sorted(data.train.lengths.tolist())[-micro:][::-1]
        asked = replace(config, batch={"global": 2 * micro, "micro": micro}, precision=Precision.fp32)
        found = simulate_depth(asked, lengths, device=torch.device("cpu"))
        needed[micro] = 1.05 * found.peak_bytes / GIB + CONTEXT
    assert needed[8] - CONTEXT > 1.2 * (needed[4] - CONTEXT), "else another micro-batch could be the answer"

    def choice(gib):
        return propose_micro_batch(config, data, Precision.fp32, RankCounts(1, 1), DeviceMemory("cpu", gib), 1.0)

    least = 0.05  # what a form may be off by, of what is simulated
    assert choice(needed[4] + least * (needed[4] - CONTEXT))[0] == 4
    assert choice(needed[8] - least * (needed[8] - CONTEXT))[0] == 4
    assert choice(needed[8] + least * (needed[8] - CONTEXT))[0] == 8
    assert choice(10.0)[0] == 16 and re.fullmatch(r"planned 0\.\d\d of 10\.00 GiB", choice(10.0)[1])
    assert choice(0.1)[0] == 1  # and two real steps will say whether it holds


def test_micro_batch_choice_is_described_by_a_dry_run(made, monkeypatch):
    at_once(monkeypatch)
    here = {"run": replace(made[0].run, device=Device.cpu), "launcher": LauncherConfig(processes=2)}
    config = replace(made[0], strategy=DdpConfig(), **here)
    told = with_proposed_micro_batch(config, made[1])
    assert told.batch["micro"] == 8
    assert re.fullmatch(
        r"auto -> 8 \(planned .* GiB; 2 steps .* will be tried\)", str(told.substitutions[MICRO_BATCH_KEY])
    )
    unseen = with_proposed_micro_batch(replace(config, run=replace(config.run, device=Device.cuda)), made[1])
    assert unseen.batch["micro"] == 1 and "on the host with the GPUs" in unseen.substitutions[MICRO_BATCH_KEY]


def test_micro_batch_that_cannot_be_simulated_is_tried(made, monkeypatch):
    monkeypatch.setattr(
        micro_module, "call_in_process", lambda *_: NotSimulated("its step cannot be simulated yet (KeyError: x)")
    )
    config, data = made
    micro, why = propose_micro_batch(config, data, Precision.fp32, RankCounts(1, 1), DeviceMemory("cpu", 10.0), 1.0)
    assert (micro, why) == (4, "not planned: its step cannot be simulated yet (KeyError: x)")


def test_micro_batch_of_a_model_right_for_one_document_is_one(made, monkeypatch):
    at_once(monkeypatch)
    monkeypatch.setattr(simulation, "needs_one_row_batches", lambda built, objective: True)
    micro, why = propose_micro_batch(*made, Precision.fp32, RankCounts(1, 1), DeviceMemory("cpu", 10.0), 1.0)
    assert micro == 1 and "one document at a time" in why


def running_out(monkeypatch, above, error=None):
    """Real steps, after which memory is said to have run out with more than `above` documents."""
    taken, real = [], oom_probe.take_probe_steps

    def take(config, given):
        real(config, given)
        taken.append(config.batch["micro"])
        if config.batch["micro"] > above:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(oom_probe, "take_probe_steps", take)
    return taken


def test_micro_batch_is_lowered_when_memory_runs_out_and_the_run_is_as_if_typed(made, given, monkeypatch):
    config, data = made
    monkeypatch.setattr(micro_module, "propose_micro_batch", lambda *_, **__: (16, "planned"))
    taken, said, frozen = running_out(monkeypatch, above=4), [], []
    settled = resolve_micro_batch(config, given, said.append, frozen.append)
    assert taken == [16, 8, 4] and settled.batch == {"global": 16, "micro": 4} and frozen == [settled]
    note = "auto -> 4 (planned; 2 steps of the longest documents held; 16 ran out of memory; 8 ran out of memory)"
    assert str(settled.substitutions[MICRO_BATCH_KEY]) == note and config.batch["micro"] == "auto"
    assert said[1:] == ["batch.micro=16 runs out of memory; trying 8", "batch.micro=8 runs out of memory; trying 4"]
    assert resolve_micro_batch(settled, given, None, None) == settled  # chosen once
    told = replace(config, batch={"global": 16, "micro": 4})
    curves = [losses(trainer_for(each, data, given.runtime)) for each in (settled, told)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("strategy", ["zero2", "zero3", *(["single", "ddp", "fsdp2", "zero1"] if EVERYTHING else [])])
def test_micro_batch_trials_leave_nothing_in_memory(made, given, strategy):
    """Else the run itself would find the memory taken: DeepSpeed's hooks keep an engine that nobody has any more."""
    config = replace(made[0], strategy=STRATEGIES[strategy], tuning=TUNINGS["full"], batch={"global": 4, "micro": 4})
    take_probe_steps(config, given)
    before = live_bytes()
    take_probe_steps(config, given)
    assert live_bytes() - before < 2**14, "an engine has megabytes"


def live_bytes():
    """Of all tensors that are there, by storage."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type != "meta":
            storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(storages.values())


def losses(trainer):
    return [float(trainer.train_step(batch).local_sums["loss"]) for batch in trainer.loader.steps(0, 3)]


def test_micro_batch_trials_that_all_run_out_end_the_run(made, given, monkeypatch):
    monkeypatch.setattr(micro_module, "propose_micro_batch", lambda *_, **__: (2, "planned 2.00 of 1.00 GiB"))
    running_out(
        monkeypatch,
        above=0,
        error=RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    )
    with pytest.raises(DoesNotFit, match=r"one document in each forward pass .*planned 2.00 of 1.00 GiB.*max_length"):
        resolve_micro_batch(made[0], given, print, None)


def test_micro_batch_trial_does_not_take_another_error_for_memory(made, given, monkeypatch):
    monkeypatch.setattr(micro_module, "propose_micro_batch", lambda *_, **__: (2, "planned"))
    running_out(monkeypatch, above=0, error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        resolve_micro_batch(made[0], given, print, None)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_out_of_memory_errors_beside_the_allocator_are_recognised(said):
    assert is_out_of_memory(RuntimeError(said)) and not is_out_of_memory(ValueError(said))


@pytest.mark.parametrize(
    ("answers", "agreed"),
    [(("out", "out"), True), (("held", "held"), False), (("held", "out"), None), (("out", "nothing"), None)],
)
def test_micro_batch_is_agreed_on_by_all_ranks_or_the_run_ends(monkeypatch, answers, agreed):
    """A rank that runs out alone leaves the others in an exchange: it waits for no answer of theirs for ever."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=seconds(30)))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    trial = _trial_description(8)
    told = {}

    def rank(number, answer):
        runtime = Runtime(number, 2, number, 2, torch.device("cpu"), None, timeout_s=round(seconds(1.5)))
        try:
            told[number] = oom_probe.all_ranks_ran_out(trial, "no memory" if answer == "out" else None, runtime)
        except DoesNotFit as error:
            told[number] = str(error)

    threads = [threading.Thread(target=rank, args=one) for one in enumerate(answers) if one[1] != "nothing"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if agreed is not None:
        assert told == {0: agreed, 1: agreed}
    else:
        out = answers.index("out")
        assert all(f"rank {out} runs out of memory" in text and "smaller number" in text for text in told.values())


def test_micro_batch_divisors():
    assert micro_batch_divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("strategy", ["fsdp2", *(["single", "ddp", "hsdp", "zero2", "zero3"] if EVERYTHING else [])])
def test_micro_batch_auto_run_takes_the_steps_of_one_with_the_number_typed(tmp_path, strategy, capfd):
    """With what was tried before thrown away; the choice is frozen."""
    words = [f"model.path={model_dir(tmp_path)}", f"data.path={write_chat_data(tmp_path / 'train.jsonl', 16)}"]
    words += ["debug=cpu2" if strategy != "single" else "debug=tiny", f"strategy={strategy}", "export.at_end=false"]
    words += [
        "run.device=cpu",
        f"data.cache_dir={tmp_path / 'cache'}",
        "logging.wandb=disabled",
        "checkpoint.every_steps=2",
    ]
    words += ["run.matmul=blas", "run.threads=1", "batch.global=8"]

    part = 8 if strategy == "single" else 4
    auto = [*words, f"run.dir={tmp_path / 'auto'}", "budget.steps=3", "batch.micro=auto"]
    assert command_warm(["train", *auto]) == 0
    said = capfd.readouterr().out
    told = [*words, f"run.dir={tmp_path / 'told'}", "budget.steps=3", f"batch.micro={part}", "profile.steps=[2,3]"]
    assert command_warm(["train", *told]) == 0
    traced = read_profile(
        tmp_path / "told"
    )  # each rank leaves a trace, of which one page tells; its steps are the same
    ranks = [str(rank) for rank in range(1 if strategy == "single" else 2)]
    assert traced.steps == (2, 3) and [row[0] for row in traced.ranks] == ranks
    assert traced.operators and {each["rank"] for each in traced.memory} == {*ranks}
    assert all((tmp_path / f"told/profile/rank-{rank}.json.gz").stat().st_size > 1000 for rank in ranks)
    rows = [rows_of(tmp_path / name) for name in ("auto", "told")]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert f"resolved: batch.micro: auto -> {part} (planned " in said
    frozen = yaml.safe_load((tmp_path / "auto/config.yaml").read_text())
    record = json.loads((tmp_path / "auto/run.json").read_text())
    assert frozen["batch"]["micro"] == record["micro_batch"] == part
    assert (
        str(parse_resolution(MICRO_BATCH_KEY, frozen["substitutions"][MICRO_BATCH_KEY]))
        == record["substitutions"][MICRO_BATCH_KEY]
    )


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
