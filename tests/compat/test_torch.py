"""Every name of torch that stands in `strategies/compat` is used here as the product uses it: a name that moved fails."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode

from strategies.compat import dispatch, fake_tensors, modules, optimizers, process_groups, python
from strategies.compat.fake_tensors import FakeTensor, FakeTensorMode
from strategies.tensor_inventory import MemoryKind


class Seen(dispatch.TorchDispatchMode):
    """Keeps the operations that come by."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


# -- Python ------------------------------------------------------------------------------------------------------------


def test_exit_functions_run_and_the_process_ends_at_once():
    program = (
        "import atexit; from strategies.compat.python import end_process, run_exit_functions\n"
        "atexit.register(print, 'registered', flush=True)\n"
        "run_exit_functions()\n"
        "try: end_process(7)\n"
        "finally: print('never', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "registered\n"), done.stderr


def test_the_frame_of_a_caller():
    def callee():
        return python.calling_frame(1).f_code.co_name

    assert callee() == "test_the_frame_of_a_caller"


# -- operations --------------------------------------------------------------------------------------------------------


def test_operations_that_a_mode_sees_under_private_names():
    x = torch.rand(2, 4)
    with Seen() as seen:
        x.to(torch.float64)
        x.sum().item()
        shaped = dispatch.RESHAPED_IN_PLACE(x, [4, 2])
    assert {dispatch.CAST.default, dispatch.READ_ON_HOST.default} <= set(seen.operations)
    assert shaped.shape == (4, 2) and shaped.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_attention_runs_through_the_kernels_that_are_named():
    q, k, v = torch.rand(3, 1, 2, 8, 16).unbind()
    with Seen() as seen:
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert dispatch.FLASH_ATTENTION_ON_CPU.default in seen.operations
    found = dispatch.ATTENTION_BY_PRODUCTS(q, k, v, None, 0.0, True)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_of_gpus_has_shapes(name):
    """Their kernels need a GPU; their shapes, and the places of their arguments, do not."""
    q = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta")
    arguments = {
        "FLASH_ATTENTION": ((0.0, True), {"scale": 0.25}),
        "EFFICIENT_ATTENTION": ((None, True, 0.0, True), {"scale": 0.25}),
        "CUDNN_ATTENTION": ((None, True, 0.0, True), {"scale": 0.25}),
    }
    more, named = arguments[name]
    assert getattr(dispatch, name)(q, q, q, *more, **named)[0].shape == q.shape


def test_a_product_by_groups():
    left, right = torch.rand(3, 2, 8, dtype=torch.bfloat16), torch.rand(3, 8, 8, dtype=torch.bfloat16)
    with Seen() as seen:
        F.grouped_mm(left, right)
    assert dispatch.GROUPED_PRODUCT.default in seen.operations


def test_storage_key_is_the_same_as_long_as_the_storage_lives():
    x = torch.empty(4, device="meta")
    other = torch.empty(4, device="meta")
    assert dispatch.storage_key(x.untyped_storage()) == dispatch.storage_key(x[1:].untyped_storage())
    assert dispatch.storage_key(x.untyped_storage()) != dispatch.storage_key(other.untyped_storage())


def test_operation_schema_names_its_arguments():
    schema = dispatch.operation_schema(torch.ops.aten.scaled_dot_product_attention.default)
    assert "is_causal" in [argument.name for argument in schema.arguments]


def test_dispatch_modes_see_no_call_made_within_no_mode():
    with Seen() as seen, dispatch.within_no_dispatch_mode():
        torch.ones(2).add(1)
    assert not seen.operations


def test_function_modes_see_no_call_made_within_no_mode():
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return 2 * func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Doubled():
        doubled = torch.neg(x)
        with dispatch.within_no_function_mode():
            plain = torch.neg(x)
    assert (doubled.tolist(), plain.tolist()) == ([-2, -2], [-1, -1])


def test_gradients_by_the_call_below_backward():
    x = torch.ones(3, requires_grad=True)
    root = (2 * x).sum()
    dispatch.run_backward((root,), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    assert x.grad.tolist() == [2, 2, 2]


def test_onednn_says_whether_it_multiplies_in_bf16():
    assert dispatch.onednn_multiplies_in_bf16() in (True, False)


def test_storage_resizes_are_reported_while_it_is_asked_for():
    storages = []
    storage = torch.ones(4).untyped_storage()
    with dispatch.resizes_reported(storages.append):
        storage.resize_(0)
    storage.resize_(16)
    assert storages == [storage] and storage.nbytes() == 16


def test_compiler_leaves_out_a_function_marked_as_constant():
    """What is marked is called while the graph is made, and is no part of it."""
    calls = []

    def table(length):
        calls.append(length)
        return torch.arange(length)

    dispatch.mark_constant_when_compiled(table)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x + table(3), backend=keep, fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [1, 2, 3] and calls == [3]
    assert not any("arange" in str(node.target) for node in graphs[0].graph.nodes)


def test_leaves_of_nested_collections():
    assert dispatch.tree_leaves([1, (2, {"a": 3}), []]) == [1, 2, 3]


# -- tensors without memory --------------------------------------------------------------------------------------------


def test_fake_tensor_is_made_as_its_class_makes_it():
    assert fake_tensors.mode_at_work(fake_tensors.FAKE_MODE) is None and dispatch.active_fake_mode() is None
    with FakeTensorMode() as mode:
        made = torch.empty(2, 3)
        assert fake_tensors.mode_at_work(fake_tensors.FAKE_MODE) is mode is dispatch.active_fake_mode()
        with fake_tensors.unset_fake_temporarily():
            assert torch.ones(2).tolist() == [1, 1]
    with dispatch.within_no_dispatch_mode():
        meta = torch.empty_strided((2, 3), (3, 1), device="meta")
        options = {"dispatch_device": True, "device_for_backend_keys": torch.device("cpu")}
        copy = fake_tensors.make_subclass(FakeTensor, meta, False, **options)
    vars(copy).update(vars(made))
    assert fake_tensors.dispatch_keys(copy) == fake_tensors.dispatch_keys(made)
    assert copy.device == torch.device("cpu") and (copy + made).shape == (2, 3)
    assert fake_tensors.pointer_may_be_read(mode) in (True, False)
    fake_tensors.refuse_when_pointer_is_read(copy)
    with pytest.raises(RuntimeError, match="data"):
        copy.data_ptr()


def test_fake_tensor_address_is_given_with_a_warning():
    with fake_tensors.FakeTensorMode():
        made = torch.empty(2)
    fake_tensors.warn_when_pointer_is_read(made)
    warns_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else once in each process
    try:
        with pytest.warns(UserWarning, match="data pointer"):
            made.data_ptr()
    finally:
        torch.set_warn_always(warns_always)


def test_default_device_at_work_is_that_of_new_tensors():
    assert torch.device(fake_tensors.default_device_at_work()) == torch.empty(1).device


def test_operation_name_is_the_aten_name():
    assert fake_tensors.operation_name(torch.ops.aten.as_strided.default) == "as_strided"


def test_collectives_of_fake_tensors_have_shapes():
    from strategies.compat.fake_collectives import CollectiveOp, FakeStore, FakeWork, Work, collective_ops, sync_ops

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        with FakeTensorMode(), Seen() as seen:
            x, parts = torch.ones(2), torch.empty(8)
            dist.all_gather_into_tensor(parts, x)
            dist.barrier()
        gather = torch.ops.c10d._allgather_base_.default
        assert gather in seen.operations and gather in collective_ops and gather in CollectiveOp.WK_ARG_1
        assert sync_ops & set(seen.operations)
        boxed = Work.boxed(FakeWork())
        group = CollectiveOp.get_process_group(torch.ops.c10d.allreduce_.default, ([x], dist.group.WORLD.boxed()))
        assert boxed is not None and dist.get_process_group_ranks(group) == [0, 1, 2, 3]
    finally:
        dist.destroy_process_group()


# -- process groups ----------------------------------------------------------------------------------------------------


def test_groups_their_patience_and_their_store(group):
    further = dist.new_group([0])
    assert {id(each) for each in process_groups.living_groups()} == {id(group), id(further)}
    process_groups.set_group_timeout(timedelta(seconds=7), further)
    assert further._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
    store = process_groups.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"
    dist.destroy_process_group(further)
    assert process_groups.living_groups() == [group]


def test_a_backend_that_needs_no_network():
    process_groups.make_fake_backend_known()
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(2))
    finally:
        dist.destroy_process_group()


def test_flight_recorder_keeps_the_exchanges():
    """In a process of its own: how many are kept is read once, before the first group."""
    program = (
        "import os; os.environ['TORCH_FR_BUFFER_SIZE'] = '16'\n"
        "import torch, torch.distributed as dist\n"
        "from strategies.compat.process_groups import recorded_collectives\n"
        "assert recorded_collectives() == []\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(3))\n"
        "last = recorded_collectives()[-1]\n"
        "print(last['profiling_name'], last['input_sizes'], last['process_group'][-1], last['collective_seq_id'], "
        "last['is_p2p'], last['time_created_ns'] > 0, 'retired' in last, flush=True)\n"
        "dist.destroy_process_group()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "gloo:all_reduce [[3]] default_pg 1 False True True"


def test_collectives_are_reported_while_it_is_asked_for(group):
    names = {"allreduce_": "sum", "_allgather_base_": "gather", "allgather_": "gather", "is_no_collective": "none"}
    reported = []
    x = torch.ones(3)
    with process_groups.collectives_reported(names, lambda name, num_bytes: reported.append((name, num_bytes))):
        dist.all_reduce(x)
        dist.all_gather([torch.empty(3)], x)
        dist.broadcast(x, 0)
    dist.all_reduce(x)
    assert reported == [("sum", 12), ("gather", 12)] and x.tolist() == [1, 1, 1]


def test_ddp_reducer_without_rebuild_makes_no_new_buckets(group):
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    wrapped.reducer = process_groups.ReducerWithoutRebuild(wrapped.reducer)
    for _ in range(2):  # the second forward pass would make the buckets anew
        wrapped(torch.ones(1, 3)).sum().backward()
    assert wrapped.reducer._rebuild_buckets() is False and wrapped.module.weight.grad is not None


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded():
    """Rank 1 of 2, whose collectives answer at once: it has one row of three, and one of padding."""
    from strategies.compat.fake_collectives import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    yield fully_shard(model, mesh=mesh)
    dist.destroy_process_group()


def test_where_a_shard_begins(sharded):
    from strategies.compat.fsdp import compute_local_shape_and_global_offset

    weight = sharded[0].weight
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    assert (tuple(shape), tuple(offset)) == ((1, 4), (2, 0))
    assert dispatch.local_part(weight).untyped_storage().data_ptr() == weight.to_local().untyped_storage().data_ptr()


def test_sharding_is_finished_before_the_first_pass(sharded):
    from strategies.compat.fsdp import finish_sharding

    sharded.to_empty(device="cpu")
    finish_sharding(sharded)
    storage = sharded[0].weight.to_local().untyped_storage()
    assert storage.nbytes() == 2 * 4 * 4, "one row and one of padding"
    sharded(torch.ones(1, 4))
    sharded.reshard()
    assert sharded[0].weight.to_local().untyped_storage().data_ptr() == storage.data_ptr()


def test_fsdp_hidden_tensors_are_those_kept_beside_parameters(sharded):
    from strategies.compat.fsdp import fsdp_internal_tensors, gather_on

    gather_on(sharded, torch.device("cpu"))
    sharded(torch.ones(1, 4)).sum().backward()
    sharded.unshard()
    found = {}
    for kind, tensor in fsdp_internal_tensors(sharded):
        found.setdefault(kind, []).append(tensor)
    assert {"parameters", "gathered", "gradients"} <= found.keys() <= {kind.value for kind in MemoryKind}
    assert sum(tensor.numel() for tensor in found["parameters"]) == 2 * (4 + 1) + 2 * (3 + 1), "padding included"


def test_fsdp_calls_custom_all_gather_and_reduce_scatter(sharded):
    from strategies.compat.fsdp import AllGather, DefaultAllocMixin, ReduceScatter

    calls = []

    class Gather(DefaultAllocMixin, AllGather):
        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            calls.append("gather")
            output_tensor.zero_()

    class Scatter(DefaultAllocMixin, ReduceScatter):
        def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
            calls.append("scatter")
            output_tensor.zero_()

    for layer in sharded:
        layer.set_custom_all_gather(Gather())
        layer.set_custom_reduce_scatter(Scatter())
    sharded(torch.ones(1, 4)).sum().backward()
    assert set(calls) == {"gather", "scatter"}


def test_fsdp_hooks_alone_are_left_out(sharded):
    from strategies.compat.fsdp import without_fsdp_hooks

    others = []
    layer = sharded[0]
    layer.register_forward_hook(lambda *_: others.append("after"))
    layer.register_forward_pre_hook(lambda *_: others.append("before"))
    sharded(torch.ones(1, 4))
    others.clear()
    own = modules_hooks(layer)
    with torch.no_grad(), without_fsdp_hooks([layer]):
        assert modules_hooks(layer) == (own[0] - 1, own[1] - 1)
        layer.unshard()
        layer(torch.ones(1, 4))
    assert others == ["before", "after"] and modules_hooks(layer) == own


def modules_hooks(module):
    return len(module._forward_pre_hooks), len(module._forward_hooks)


# -- modules -----------------------------------------------------------------------------------------------------------


def test_module_parameters_and_buffers_are_listed_and_replaced():
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False))
    model[1].register_buffer("lost", torch.zeros(1), persistent=False)
    assert list(modules.own_modules(model)) == ["0", "1"]
    assert modules.own_parameters(model[1])["bias"] is None and modules.own_buffers(model[1])["lost"] is model[1].lost
    stored = {name for name, _ in modules.persistent_buffers(model)}
    assert stored == model.state_dict().keys() - {"1.weight"}
    modules.replace_buffers(model, lambda buffer: buffer.double())
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float64}


def test_whether_a_module_is_compiled():
    layer = nn.Linear(1, 1)
    assert not modules.is_compiled(layer)
    layer.compile(backend="eager")
    assert modules.is_compiled(layer)


def test_a_module_that_does_not_move():
    layer = nn.Linear(1, 1)
    modules.disable_device_moves(layer)
    assert layer.to(torch.float64) is layer and layer.weight.dtype is torch.float32


def test_lstm_computes_with_the_weights_that_it_is_given():
    lstm = nn.LSTM(2, 2)
    weights = [torch.zeros_like(getattr(lstm, name)) for name in modules.lstm_weight_names(lstm)]
    assert len(weights) == 4
    modules.set_lstm_weights(lstm, weights)
    assert not lstm(torch.ones(1, 1, 2))[0].any()


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_optimizer_operations_on_lists_of_tensors():
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([-2.0])]
    assert [float(norm) for norm in optimizers.norm_of_each(tensors)] == [5, 2]
    doubled = optimizers.product_of_each(tensors, 2.0)
    assert [t.tolist() for t in doubled] == [[6, -8], [-4]]
    optimizers.multiply_each(doubled, torch.tensor(0.5))
    optimizers.add_each(doubled, tensors, alpha=-0.5)
    assert [t.tolist() for t in doubled] == [[1.5, -2], [-1]]
    optimizers.take_sign_of_each(doubled)
    assert [t.tolist() for t in doubled] == [[1, -1], [-1]]
    optimizers.copy_each(doubled, tensors)
    assert [t.tolist() for t in doubled] == [[3, -4], [-2]]


def test_muon_of_the_parts_is_torchs():
    torch.manual_seed(0)
    weight, grad = torch.rand(4, 3), torch.rand(4, 3)
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    torch.optim.Muon([parameter], lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    update = optimizers.orthogonalised_in_bf16(grad, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    rate = optimizers.adjusted_rate(0.1, None, weight.shape)
    torch.testing.assert_close(parameter.detach(), weight.add(update, alpha=-rate))


def test_adafactor_of_the_parts_is_torchs():
    torch.manual_seed(0)
    weight, grad = torch.rand(3), torch.rand(3)
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    torch.optim.Adafactor([parameter], lr=0.1).step()
    options = {"d": 1.0, "lr": 0.1, "beta2_decay": -0.8, "weight_decay": 0.0, "eps1": None, "eps2": 1e-3}
    state = [torch.zeros(3)], [torch.tensor(0.0)]
    optimizers.adafactor([weight], [grad], [None], [None], *state, foreach=False, maximize=False, **options)
    torch.testing.assert_close(parameter.detach(), weight)
