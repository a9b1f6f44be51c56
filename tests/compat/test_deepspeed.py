"""Every name of DeepSpeed that stands in `strategies/compat` is used here as the product uses it: a name that moved fails."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from strategies.base import Precision, ZeroConfig
from strategies.compat import deepspeed as compat
from strategies.compat.process_groups import living_groups
from strategies.deepspeed_library import import_deepspeed
from strategies.zero_config import deepspeed_config


@pytest.fixture
def library(monkeypatch):
    """DeepSpeed in a process group of this process alone, which it forgets afterwards."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    found = import_deepspeed(on_cpu=True)
    # Another test of this process may have left groups behind, which DeepSpeed would go on with.
    compat.forget_deepspeed_groups(also_existing=True)
    compat.forget_backend()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    found.init_distributed(dist_backend="gloo", verbose=False)
    yield found
    compat.restore_torch_linear()
    dist.destroy_process_group()
    compat.forget_deepspeed_groups()
    compat.forget_backend()


def engine_of(library, stage):
    """An engine of one layer, after one step."""
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    settings = deepspeed_config(
        ZeroConfig(name=f"zero{stage}", stage=stage),
        precision=Precision.bf16,
        max_grad_norm=1.0,
        on_cpu=True,
        trained_per_rank=8,
    )
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def step(engine):
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum())
    engine.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_optimizer_tensors_and_gradient_norm_are_found(library, stage):
    engine = engine_of(library, stage)
    norms = []
    inner = engine.optimizer.optimizer
    inner.register_step_pre_hook(lambda *_: norms.append(float(compat.grad_norm_in_step(engine.optimizer))))
    step(engine)
    assert norms == [pytest.approx(8**0.5, rel=1e-2)]
    found = {}
    for kind, tensor in compat.zero_optimizer_tensors(engine.optimizer):
        found.setdefault(kind, []).append(tensor)
    assert {"parameters", "optimizer"} <= found.keys() <= {"parameters", "optimizer", "gradients", "communication"}
    assert any(tensor.dtype is torch.float32 and tensor.numel() >= 8 for tensor in found["optimizer"])
    engine.destroy()


def test_where_the_master_of_a_parameter_lies(library):
    engine = engine_of(library, 1)
    fragment = compat.fp32_fragment(engine.module.weight)
    assert (fragment.hp_fragment_address.numel, fragment.lp_fragment_address.start) == (8, 0)
    engine.destroy()


def test_no_report_of_memory_is_printed(library, capfd):
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage("here", force=True)
    assert "here" not in "".join(capfd.readouterr())


def test_no_op_is_compiled_for_exchange(library):
    from deepspeed.comm.torch import build_shm_op

    library.ops.__compatible_ops__["deepspeed_shm_comm"] = True
    compat.disable_shared_memory_op()
    assert build_shm_op() is None


def test_linear_is_torchs_again(library):
    before = F.linear
    with library.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}, "train_batch_size": 1}):
        nn.Linear(2, 2)
    compat.restore_torch_linear()
    assert F.linear is before


def test_deepspeed_collectives_go_to_the_backend_put_in_their_place(library):
    class Counted:
        def __init__(self, backend):
            self.backend, self.calls = backend, []

        def __getattr__(self, name):
            self.calls.append(name)
            return getattr(self.backend, name)

    made = []

    def counted(backend):
        made.append(Counted(backend))
        return made[0]

    compat.replace_backend(counted)
    library.comm.all_reduce(torch.ones(2))
    assert "all_reduce" in made[0].calls
    compat.replace_backend(lambda current: current.backend)


def test_deepspeed_groups_that_are_gone_are_forgotten(library):
    from deepspeed.utils import groups

    assert groups._get_data_parallel_group() is not None and groups._WORLD_GROUP in living_groups()
    compat.forget_deepspeed_groups()
    assert groups._WORLD_GROUP is not None, "it still lives"
    compat.forget_deepspeed_groups(also_existing=True)
    assert groups._WORLD_GROUP is None


def test_deepspeed_backend_is_formed_anew_once_it_is_forgotten(library):
    compat.forget_backend()
    assert not library.comm.is_initialized()
    library.init_distributed(dist_backend="gloo", verbose=False)
    assert library.comm.is_initialized()


def test_deepspeed_stage_3_calls_the_collectives_put_in_their_place(library):
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle
    from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks

    calls = set()

    def scatter(*args, **kwargs):
        calls.add("scatter")
        return reduce_scatter_coalesced(*args, **kwargs)

    class Handle(AllGatherCoalescedHandle):
        def wait(self, *args, **kwargs):
            calls.add("gather")
            super().wait(*args, **kwargs)

    try:
        compat.replace_stage3_functions(
            reduce_scatter=scatter, gathered_handle=Handle, compare_integers=lambda _integers: calls.add("compare")
        )
        engine = engine_of(library, 3)
        for _ in range(2):  # numbers are compared when the order of modules is known, which is with the second step
            step(engine)
        engine.destroy()
    finally:
        compat.replace_stage3_functions(
            reduce_scatter=reduce_scatter_coalesced,
            gathered_handle=AllGatherCoalescedHandle,
            compare_integers=assert_ints_same_as_other_ranks,
        )
    assert "scatter" in calls and calls <= {"scatter", "gather", "compare"}
