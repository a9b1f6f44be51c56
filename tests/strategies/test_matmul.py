"""The library of float32 products: who is taken when, what it computes, and which stretches stay with BLAS."""

import os
import time

import pytest
import torch

from strategies import matmul
from strategies import runtime as processes
from strategies.matmul import Matmul, MatmulChoice, Processor
from strategies.runtime import Runtime
from tests.helpers.building import data_set, model_dir, run_config, take_steps, trainer_for
from trainer.model import attention
from trainer.session import run_facts as report


@pytest.fixture(autouse=True)
def as_before():
    """Whatever ran before in this process."""
    matmul.use_default_matmul_library()
    yield
    matmul.use_default_matmul_library()


def taken() -> str:
    return {"medium": "onednn", "highest": "blas"}[torch.get_float32_matmul_precision()]


ZEN5, ZEN4 = (row.processor for row in matmul.MEASURED_RATIOS)


def on(monkeypatch, processor):
    """As if this were another processor, on which oneDNN keeps all bits of float32."""
    monkeypatch.setattr(matmul, "this_processor", lambda: processor)
    monkeypatch.setattr(matmul, "_onednn_keeps_float32", lambda: True)


@pytest.mark.parametrize(
    ("processor", "chosen"),
    [
        (ZEN5, "onednn (oneDNN is 2.2 times as fast on AMD Zen 5)"),
        (ZEN4, "blas (oneDNN is only 1.1 times as fast on AMD Zen 4)"),
        (
            Processor("AuthenticAMD", 26, "AVX2", "mkl"),
            "blas (oneDNN was not measured on AuthenticAMD family 26 with AVX2",
        ),
        (Processor("AuthenticAMD", 26, "AVX512", "open"), "blas (oneDNN was not measured on"),
        (Processor("", 0, "default", "accelerate"), "blas (oneDNN was not measured on this processor with default"),
    ],
)
def test_matmul_auto_goes_by_the_processor(monkeypatch, processor, chosen):
    on(monkeypatch, processor)
    choice = matmul.choose_matmul_library(Matmul.auto)
    assert str(choice).startswith(chosen)
    assert taken() == choice.library
    matmul.use_default_matmul_library()
    assert taken() == "blas"


def test_auto_does_not_take_the_time(monkeypatch):
    """Other work on the host must not sway the choice, so that two starts choose alike."""
    on(monkeypatch, ZEN5)
    for clock in ("perf_counter", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, clock, lambda: pytest.fail("the choice asked a clock"))
    assert {str(matmul.choose_matmul_library(Matmul.auto)) for _ in range(3)} == {
        "onednn (oneDNN is 2.2 times as fast on AMD Zen 5)"
    }


def test_the_processor_is_read_from_the_kernel_and_torch(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n\nprocessor\t: 1\n")
    monkeypatch.setattr(matmul, "_CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.__config__, "show", lambda: "PyTorch built with:\n  BLAS_INFO=mkl, BUILD_TYPE=Release")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    here = matmul.this_processor.__wrapped__
    assert here() == ZEN5
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert here().instructions == "ONEDNN_MAX_CPU_ISA=AVX2"
    info.unlink()
    assert (here().vendor, here().family) == ("", 0)
    info.write_bytes(b"vendor_id: \xff\ncpu family: many\n")
    assert here().family == 0


def test_matmul_library_is_the_same_on_ranks_with_different_processors():
    matmul._set_float32_library(onednn=True)
    blas, onednn = MatmulChoice(Matmul.blas, "unknown here"), MatmulChoice(Matmul.onednn, "fast here")
    assert matmul.agree_on_matmul_library([onednn, onednn], 1) == onednn
    assert taken() == "onednn"
    assert str(matmul.agree_on_matmul_library([onednn, blas], 0)) == "blas (rank 1: unknown here)"
    assert taken() == "blas"


@pytest.mark.parametrize("asked", [Matmul.auto, Matmul.onednn])
def test_a_processor_that_would_round_is_refused(monkeypatch, asked):
    """As AMX does: a product of numbers that bfloat16 cannot hold does not come back."""
    use = matmul._set_float32_library
    eye = torch.eye
    rounding = {"on": False}

    def switched(*, onednn):
        use(onednn=onednn)
        rounding["on"] = onednn

    monkeypatch.setattr(matmul, "_set_float32_library", switched)
    monkeypatch.setattr(torch, "eye", lambda n: eye(n) * (1.001 if rounding["on"] else 1.0))
    assert str(matmul.choose_matmul_library(asked)) == "blas (oneDNN would round float32 products to bfloat16 here)"
    assert taken() == "blas"


@pytest.mark.parametrize(
    ("asked", "settled", "recorded"),
    [
        ("auto", MatmulChoice(Matmul.onednn, "fast here"), "auto -> onednn (fast here)"),
        ("onednn", MatmulChoice(Matmul.blas, "this torch has no oneDNN"), "onednn -> blas (this torch has no oneDNN)"),
        ("onednn", MatmulChoice(Matmul.onednn, "as asked"), None),
        ("auto", None, None),  # on a GPU nothing is chosen
    ],
)
def test_matmul_library_is_recorded_in_run_json(tmp_path, asked, settled, recorded):
    config = run_config(model_dir(tmp_path), "single", "full", micro=4, steps=1)
    config.run.matmul = Matmul(asked)
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"), None, matmul=settled)
    facts = report._substitutions(config, {}, config.precision, runtime)
    assert facts.get("run.matmul") == recorded


def test_kept_kernels_are_few(monkeypatch):
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    matmul.choose_matmul_library(Matmul.blas)
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"  # the user's word stands


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("long", "of_seven"), [(8, "blas"), (6, "onednn")])
def test_attention_of_short_documents_stays_with_blas(monkeypatch, softcap, long, of_seven):
    """There it is BLAS, before, after and in long ones the chosen library; the same backward; the same result."""
    monkeypatch.setattr(attention, "LONG_DOCUMENT_TOKENS", long)
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor, where):
            ctx.where = where
            seen.append((where, "forward", taken()))
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((ctx.where, "backward", taken()))
            return grad, None

    one = attention._attend_one_document
    monkeypatch.setattr(attention, "_attend_one_document", lambda q, *rest: Spy.apply(one(q, *rest), q.shape[2]))
    bounds = [0, 5, 12]

    def run():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 12, 16, generator=generator).requires_grad_() for _ in range(3))
        before = (Spy.apply(t, "before") for t in (q, k, v))
        boundaries = torch.tensor(bounds)
        out, _ = attention.varlen_attention(
            torch.nn.Module(), *before, None, softcap=softcap, cu_seq_lens_q=boundaries, document_bounds=bounds
        )
        Spy.apply(out, "after").square().sum().backward()
        return out.detach(), q.grad, k.grad, v.grad

    plain = run()
    assert {library for _, _, library in seen} == {"blas"}
    seen.clear()
    monkeypatch.setattr(
        matmul, "_onednn_keeps_float32", lambda: True
    )  # where AMX would round, that is not this test's matter
    matmul.choose_matmul_library(Matmul.onednn)
    switched = run()
    expected = {"before": "onednn", 5: "blas", 7: of_seven, "after": "onednn"}
    assert {(where, way) for where, way, _ in seen} == {(w, way) for w in expected for way in ("forward", "backward")}
    assert all(library == expected[where] for where, _, library in seen)
    for a, b in zip(plain, switched, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if of_seven == "blas" else 1e-5, atol=0 if of_seven == "blas" else 1e-6)


def test_matmul_libraries_take_the_same_steps(tmp_path):
    """Losses and gradient norms agree to 1e-5."""
    curves = {}
    for asked in (Matmul.blas, Matmul.onednn):
        runtime = processes.join_job("cpu", timeout_s=60, threads=1, matmul=asked)
        try:
            assert runtime.matmul.library is asked or "round" in runtime.matmul.reason
            config = run_config(model_dir(tmp_path), "single", "full", micro=4, steps=4)
            curves[asked] = take_steps(trainer_for(config, data_set(tmp_path, uneven=True), runtime), 4)
        finally:
            processes.leave_job()
    torch.testing.assert_close(
        torch.tensor(curves[Matmul.blas]), torch.tensor(curves[Matmul.onednn]), rtol=1e-5, atol=1e-7
    )
