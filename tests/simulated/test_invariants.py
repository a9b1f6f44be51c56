"""What holds of every simulated step, whatever the versions; and, with those that wrote the table, its numbers."""

from dataclasses import astuple

import pytest
import torch
import torch.distributed as dist

from strategies.errors import ConfigError
from strategies.fsdp2 import Fsdp2Engine
from strategies.tensor_inventory import MemoryKind
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING, SEED, cover, values
from tests.simulated.cases import LENGTHS, NATIVE, Case, chosen_cases, comparable, cost, simulated
from tests.simulated.goldens import golden, has_versions_of_table, name_of, summary
from trainer.model.config import ModelConfig, Quantisation
from trainer.model.loading import load_model_config
from trainer.model.quantisation import QuantisationScheme
from trainer.planner import minimal_step

CASES = chosen_cases()
if not EVERYTHING:  # each strategy and tuning, and each other value, of those whose numbers are kept
    CASES = cover(CASES, lambda one: values((*astuple(one[0]), one[1])), cost=cost)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated")


@pytest.mark.parametrize(("case", "world"), CASES, ids=[name_of(*one) for one in CASES])
def test_simulated_step_has_its_invariants_and_recorded_numbers(place, case, world):
    model = case.model_in(place)
    found = simulated(case, model, world)
    assert wrong(case, found, simulated(case, model, world, world - 1, repeat=0) if world > 1 else found) == []
    if not case.offload:
        assert found.bytes_to_host == 0 and found.host_bytes < 4096, "only what counts, such as steps, lies on the host"
    assert found.resting_bytes_by_kind[MemoryKind.parameters] > 0
    assert (
        sum(found.resting_bytes_by_kind.values())
        <= found.phase_and_peak[1].total_bytes
        == max(h.total_bytes for h in found.peak_by_phase.values())
    )
    assert (MemoryKind.optimizer in found.resting_bytes_by_kind) != case.offload
    if (row := golden(case, world)) is not None:
        assert summary(found) == row, "numbers moved: see tests/simulated/goldens.py"


def wrong(case, found, last):
    """What would hang or slow a job down, in words; `found` is the step of rank 0, `last` of the last rank."""
    said = []
    if calls(found) != calls(last):
        said.append("rank 0 and the last rank call different collectives: such a job hangs")
    if case.strategy in NATIVE and found.host_reads:
        said.append(f"the host waits for the device: {dict(found.host_reads)}")
    if not case.offload and not all(each.is_on_device for each in found.collectives):
        said.append("a tensor of the host in a collective of the device's group")
    return said


def on_host(engine, squared):
    dist.all_reduce(torch.zeros(1), group=engine.shard_group)
    return squared


def on_one_rank(engine, squared):
    if engine.runtime.rank == 0:
        dist.all_reduce(squared, group=engine.shard_group)
    return squared


def read(engine, squared):
    return squared * float(squared)


@pytest.mark.skipif(EVERYTHING or SEED != 0, reason="the table has the rows of the usual choice")
def test_every_chosen_case_has_recorded_numbers():
    """Else a step would be compared with nothing: a change of the matrix, or of a cost, chooses other cases."""
    if not has_versions_of_table():
        pytest.skip("the table was written with other versions")
    assert [name_of(case, world) for case, world in CASES if golden(case, world) is None] == []


@pytest.mark.parametrize(
    ("broken", "said"), [(on_host, "tensor of the host"), (on_one_rank, "hangs"), (read, "the host waits")]
)
def test_an_engine_that_does_wrong_is_seen(place, monkeypatch, broken, said):
    """Each rule of `test_simulated_step_has_its_invariants_and_recorded_numbers`, broken once in the engine's own step."""
    monkeypatch.setattr(Fsdp2Engine, "_sum_squared_norm_over_ranks", broken)
    case = Case("fsdp2", "full", "bf16")
    found, last = (simulated(case, case.model_in(place), 8, rank, repeat=0) for rank in (0, 7))
    assert len(seen := wrong(case, found, last)) == 1 and said in seen[0]


def test_operands_on_two_devices_are_refused(place, monkeypatch):
    """A batch that stays on the host, under a model on the GPU."""
    monkeypatch.setattr(minimal_step, "to_device", lambda batch, device: batch)
    case = Case("single", "full", "bf16")
    with pytest.raises(RuntimeError, match="device"):
        simulated(case, case.model_in(place), 1, repeat=0)


def test_a_mixture_on_more_ranks_than_experts_is_refused_as_in_a_run(place):
    case = Case("fsdp2", "experts", "bf16")
    with pytest.raises(ConfigError, match=r"strategy=hsdp strategy.replicate=8, which shards over 8"):
        simulated(case, case.model_in(place), 64)


def test_arithmetic_of_a_mixture_is_that_of_a_dense_model_as_wide_as_the_experts_a_token_sees(place):
    mixture, dense = Case("single", "experts", "bf16"), Case("single", "full", "bf16")
    path = mixture.model_in(place)
    config = load_model_config(ModelConfig(path=str(path)))
    width = config.moe_intermediate_size * config.num_experts_per_tok
    plain = model_dir(place / "dense", "qwen3", intermediate_size=width)
    routers = 6 * sum(LENGTHS) * config.num_hidden_layers * config.num_experts * config.hidden_size
    assert simulated(mixture, path, 1).flops == simulated(dense, plain, 1).flops + routers


def test_simulation_leaves_nothing_to_the_next_one_or_to_real_tensors(place):
    """The values that 4-bit codes stand for are kept from step to step."""
    case = Case("single", "nf4", "bf16")
    first, second = (comparable(simulated(case, case.model_in(place), 1, device=torch.device("cpu"))) for _ in range(2))
    assert first == second
    weight, scheme = torch.randn(8, 64), QuantisationScheme(Quantisation.nf4)
    assert (scheme.dequantise(scheme.quantise(weight), (8, 64), torch.float32) - weight).abs().max() < 0.5


def calls(found):
    """What must be alike on all ranks; groups only by their size, since replicas form several."""
    return [(each.name, len(each.ranks), each.dtype, each.num_bytes) for each in found.collectives]
