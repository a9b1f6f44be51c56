"""Paths that only a GPU has; every test here skips itself where there is none."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from strategies import flight_recorder
from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, SingleConfig
from strategies.build import resolve_precision
from strategies.hardware import best_precision, gpu_of_device
from strategies.parameters import meta_context
from tests.helpers.building import GLOBAL_BATCH, data_set, model_dir, run_config, take_steps, trainer_for
from tests.models import tiny
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.model import attention, flex
from trainer.model.config import Attention, ModelConfig
from trainer.objectives import forward_path
from trainer.optim.config import AdamwConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def runtime():
    yield processes.join_job("cuda", timeout_s=60)
    processes.leave_job()


def curve(tmp_path, runtime, **changes):
    config = run_config(model_dir(tmp_path), "single", "full", micro=GLOBAL_BATCH, steps=4, **changes)
    return take_steps(trainer_for(config, data_set(tmp_path, uneven=True), runtime), 4)


def test_fp32_on_the_device_is_the_cpu_curve(tmp_path, runtime):
    device = curve(tmp_path, runtime)
    host = curve(tmp_path, replace(runtime, device=torch.device("cpu")))
    for (loss, norm), (right_loss, right_norm) in zip(device, host, strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-4)
        assert norm == pytest.approx(right_norm, rel=1e-3)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_half_precision_tracks_fp32(tmp_path, runtime, precision):
    for (loss, _), (right, _) in zip(
        curve(tmp_path, runtime, precision=precision), curve(tmp_path, runtime), strict=True
    ):
        assert loss == pytest.approx(right, rel=1e-2)


def test_gpu_is_described_as_by_its_driver(runtime):
    gpu = gpu_of_device(runtime.device)
    assert gpu.capability == torch.cuda.get_device_capability(runtime.device)
    assert resolve_precision(Precision.auto, runtime) is best_precision(gpu)
    attend = attention._has_flash_kernel(runtime.device, 64)
    assert attend == gpu.has_flash


def test_exchanges_of_nccl_are_read(runtime):
    dist.all_reduce(torch.ones(4, 2, device=runtime.device))
    torch.cuda.synchronize()
    last = flight_recorder.last_collective()
    assert (last.operation, last.sizes) == ("nccl:all_reduce", [[4, 2]])


def test_an_average_follows_shards_that_are_pinned_on_the_host(tmp_path, runtime):
    """FSDP2 pins them in another place than where they were filled."""
    strategy, optim = Fsdp2Config(cpu_offload=True), AdamwConfig(lr=1e-3, ema_decay=0.5)
    config = run_config(model_dir(tmp_path), strategy, "full", micro=GLOBAL_BATCH, steps=2, optim=optim)
    trainer = trainer_for(config, data_set(tmp_path, uneven=True), runtime)
    take_steps(trainer, 2)
    engine = trainer.engine
    for (name, parameter), seen in zip(engine.trainable, engine.weight_average.weights, strict=True):
        local = parameter.to_local()
        assert local.is_pinned() and local.data_ptr() == seen.data_ptr(), name


def test_gpu_control_messages_go_over_the_host_and_its_memory_is_reported(tmp_path, runtime):
    """One group for both: objects and flags of a job must not wait for the device."""
    assert torch.device("cpu") in runtime.control_group._device_types
    config = run_config(model_dir(tmp_path), "single", "full", micro=GLOBAL_BATCH // 2, steps=2)
    trainer = trainer_for(config, data_set(tmp_path, uneven=True), runtime)
    for batch in trainer.loader.steps(0, 2):
        trainer.meter.add(trainer.train_step(batch))
    row = trainer.meter.flush()[-1]
    assert row["memory_reserved_gib"] >= row["memory_gib"] > 0


@pytest.mark.parametrize("made", ["training", "evaluation"])
def test_batches_arrive_whole_from_pinned_memory(tmp_path, runtime, made):
    config = run_config(model_dir(tmp_path), "single", "full", micro=GLOBAL_BATCH)
    data = data_set(tmp_path, uneven=True)
    trainer = trainer_for(config, data, runtime)
    host = trainer_for(config, data, replace(runtime, device=torch.device("cpu")))
    pairs = []
    for each in (trainer, host):
        if made == "training":
            pairs.append([micro for step in each.loader.steps(0, 3) for micro in step.micro_batches])
        else:
            share = EvalShare(5, 0, 1)
            pairs.append(list(eval_batches(data.evaluation, share, each.loader.collator, each.loader.device)))
    for device, expected in zip(*pairs, strict=True):
        assert device["input_ids"].is_cuda
        for name, value in expected.items():
            assert not torch.is_tensor(value) or torch.equal(device[name].cpu(), value), name


@pytest.mark.parametrize("mode", [*ActivationCheckpointing][1:])
def test_compiled_blocks_train_alike(tmp_path, runtime, mode):
    strategy = SingleConfig(compile=True, activation_checkpointing=mode)
    plain, compiled = curve(tmp_path, runtime), curve(tmp_path, runtime, strategy=strategy)
    for (loss, _), (right, _) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_train_alike(tmp_path, runtime, mode):
    """The variable-length kernel among what is kept."""
    strategy = SingleConfig(activation_checkpointing=ActivationCheckpointing(mode))
    plain = curve(tmp_path, runtime, precision=Precision.bf16)
    found = curve(tmp_path, runtime, precision=Precision.bf16, strategy=strategy)
    for (loss, _), (right, _) in zip(found, plain, strict=True):
        assert loss == pytest.approx(right, rel=1e-3)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn 2")
def test_flash_attention_trains_like_varlen(tmp_path, runtime):
    path = str(model_dir(tmp_path))
    flash = ModelConfig(path=path, attention=Attention.flash_attention_2)
    varlen = ModelConfig(path=path, attention=Attention.varlen)
    found = curve(tmp_path, runtime, precision=Precision.bf16, model=flash)
    expected = curve(tmp_path, runtime, precision=Precision.bf16, model=varlen)
    for (loss, _), (right, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_heads_and_windows_build_no_square(dtype):
    """torch's math kernel, which would, is not even allowed; memory shows the rest: T x T alone would be 1 GiB."""
    length, window = 16384, 512
    q = torch.randn(1, 8, length, 64, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, 2, length, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    for seen in (None, window):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            out = attention._attend_one_document(q, k, v, attention.AttentionRule(None, 0.0, seen, None, True, None))
            out.sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 2**29
        q.grad = k.grad = v.grad = None


@pytest.mark.parametrize(("kv_heads", "window", "width"), [(4, None, 32), (2, None, 32), (2, 8, 32), (4, None, 16)])
def test_varlen_kernel_equals_one_call_for_each_document(kv_heads, window, width):
    """The last has values narrower than queries and keys, as latent attention has."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 40, 41, 64], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, 64, size, device="cuda", dtype=torch.bfloat16) for size in (32, width))
    module = torch.nn.Module()
    options = {"sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": 33}
    kernel, _ = attention.varlen_attention(module, q, k, v, None, **options)
    exact, _ = attention.varlen_attention(module, q.float(), k.float(), v.float(), None, **options)
    assert torch.allclose(kernel.float(), exact, atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("gpt_oss", flex.FLEX_ATTENTION), ("gemma2", flex.FLEX_ATTENTION), ("llama4_text", attention.VARLEN_ATTENTION)],
)
def test_flex_attention_proves_sinks_soft_caps_and_chunks_on_this_gpu(kind, kernel):
    """Through the kernel itself, in bf16."""
    flex.register()
    attention.register()
    config = tiny.tiny_config(kind)
    with meta_context():
        plain = transformers.AutoModelForCausalLM.from_config(config)
    found = forward_path._prove_paths(config, lambda: plain, kernel, on_gpu=True)
    assert found.padding_free is not None, found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 48])
def test_answers_that_share_a_prompt_attend_on_a_gpu_as_on_the_cpu(dtype, window):
    """The kernel in half precision, and branch by branch in float32; outputs and gradients, against float32 on the CPU."""
    bounds, branches = [0, 400, 700], [[100, 180, 181], [40, 200]]
    drawn = torch.Generator().manual_seed(0)
    row = [torch.randn(1, heads, 700, 64, generator=drawn) for heads in (8, 2, 2)]
    direction = torch.randn(1, 700, 8, 64, generator=drawn)

    def computed(device, dtype):
        operands = [t.to(device, dtype).requires_grad_() for t in row]
        boundaries = torch.tensor(bounds, dtype=torch.int32, device=device)
        out, _ = attention.varlen_attention(
            torch.nn.Module(),
            *operands,
            None,
            sliding_window=window,
            cu_seq_lens_q=boundaries,
            document_bounds=bounds,
            branches=branches,
        )
        gradients = torch.autograd.grad((out * direction.to(device, dtype)).sum(), operands)
        return [t.float().cpu() for t in (out, *gradients)]

    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for found, right in zip(computed("cuda", dtype), computed("cpu", torch.float32), strict=True):
        assert (found - right).norm() <= tolerance * right.norm()


def test_a_prompt_computed_once_for_its_answers_gives_the_same_steps_on_a_gpu(tmp_path, runtime):
    """In bf16 by the variable-length kernel, beside answers each with its prompt."""
    from tests.helpers.rounds import prompts_of, round_config, round_trainer

    curves = []
    for shares in (False, True):
        config = round_config(tmp_path, model_dir(tmp_path), "single", micro=16, rollout={"share_prompts": shares})
        config = replace(config, precision=Precision.bf16)
        trainer = round_trainer(config, prompts_of(config), runtime)
        assert trainer.loader.round_builder.batcher.shares_prompts is shares
        curves.append(take_steps(trainer, 2))
    for (loss, norm), (right_loss, right_norm) in zip(*curves, strict=True):
        assert loss == pytest.approx(right_loss, abs=2e-2)
        assert norm == pytest.approx(right_norm, rel=5e-2)
