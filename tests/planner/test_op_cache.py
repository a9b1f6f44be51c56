"""An operation that is answered from memory gives what torch gives."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from strategies.runtime import SIMULATED
from tests.helpers.covering import EVERYTHING
from tests.simulated.cases import Case, comparable, simulated
from trainer.planner import op_cache
from trainer.planner.step_recorder import StepRecorder

aten = torch.ops.aten


def form(tensor):
    place = tensor.storage_offset(), tensor.untyped_storage().nbytes()
    keys = torch._C._dispatch_key_set(tensor)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, keys, *place


def operands():
    """Tensors of one form, the second a part of a larger one that begins elsewhere."""
    whole = torch.empty(9, 4, device=SIMULATED, dtype=torch.bfloat16)
    return torch.empty(6, 4, device=SIMULATED, dtype=torch.bfloat16), whole[2:8]


OPERATIONS = [
    lambda x: x.mm(x.t()),
    lambda x: x.t(),
    lambda x: x.view(2, 3, 4).unsqueeze(0).expand(5, -1, -1, -1),
    lambda x: x.float(),
    lambda x: x.mul_(2),
    lambda x: x.sum(-1, keepdim=True),
    lambda x: x.split(4)[1],
    lambda x: x.chunk(3, dim=1)[0],
    lambda x: x[1:3],
    lambda x: x[3:5],
    lambda x: x[-4:, 1::2],
    lambda x: x.narrow(1, 3, 9 - 8),
    lambda x: x.as_strided((2, 2), (2, 1), 3),
    lambda x: x.detach(),
    lambda x: x.cpu(),
    lambda x: torch.cat([x, x]),
    lambda x: torch.topk(x, 2)[1],
    lambda x: torch.empty_like(x, dtype=torch.int64),
    lambda x: torch.add(x, 1),
    lambda x: torch.add(x, 1.5),
    lambda x: torch.arange(0, 4, device=SIMULATED) + True,
    lambda x: x[torch.arange(0, 3, device=SIMULATED)],
]


def test_op_cache_gives_what_each_operation_gives(monkeypatch):
    monkeypatch.setattr(op_cache, "_RESULTS", {})
    with FakeTensorMode():
        expected = [form(made(x)) for made in OPERATIONS for x in operands()]
        for _ in range(2):
            with StepRecorder(SIMULATED) as recorder:
                assert [form(made(x)) for made in OPERATIONS for x in operands()] == expected
        given = len(op_cache._RESULTS)
        with StepRecorder(SIMULATED) as recorder:
            x = operands()[1]
            before = recorder.live_bytes
            view = x[1:3]
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata and recorder.live_bytes == before
            assert x.mul_(2) is x and recorder.live_bytes == before
            copied = x.float()
            assert recorder.live_bytes == before + 512 and isinstance(copied, FakeTensor)
    assert len(op_cache._RESULTS) == given > len(OPERATIONS), "the last pass asked for nothing new"


def test_op_cache_does_not_remember_what_depends_on_values(monkeypatch):
    monkeypatch.setattr(op_cache, "_RESULTS", {})
    mask = torch.ones(4, dtype=torch.bool)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4)
        fake = torch.empty(4, dtype=torch.bool)
        assert op_cache.cacheable_operation(aten.add.Tensor, (x, x), {}) is not None
        assert op_cache.cacheable_operation(aten.add.Tensor, (x, mask), {}) is None, "a real one"
        assert op_cache.cacheable_operation(aten.index.Tensor, (x, [fake]), {}) is None
        assert op_cache.cacheable_operation(aten.index.Tensor, (x, [torch.empty(2, dtype=torch.int64)]), {}) is not None
        assert op_cache.cacheable_operation(aten.nonzero.default, (fake,), {}) is None
        assert op_cache.cacheable_operation(aten._local_scalar_dense.default, (x,), {}) is None
        assert op_cache.cacheable_operation(aten.resize_.default, (x, [8]), {}) is None
        assert op_cache.cacheable_operation(aten.add.Tensor, (x, torch.tensor(3.0)), {}) is None, "whose value is known"
    assert op_cache.cacheable_operation(aten.add.Tensor, (torch.empty(4), torch.empty(4)), {}) is None, (
        "real tensors alone"
    )


@pytest.mark.parametrize(
    "case",
    [
        Case("zero3", "full", "bf16"),
        Case("single", "experts", "bf16", "full"),
        # What test_reality.py compares with real tensors is answered from memory, too.
        *([Case("fsdp2", "nf4", "bf16", "selective")] if EVERYTHING else []),
    ],
    ids=str,
)
def test_op_cache_leaves_a_simulated_step_as_it_is(tmp_path, monkeypatch, case):
    model, world = case.model_in(tmp_path), 1 if case.strategy == "single" else 4
    with monkeypatch.context() as patch:
        patch.setattr(op_cache, "cacheable_operation", lambda *_: None)
        expected = comparable(simulated(case, model, world))
    assert comparable(simulated(case, model, world)) == expected
