"""P-tuning's LSTM where the processor has none in half precision: float32, and the run says so."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from strategies.base import Precision
from tests.helpers.building import data_set, model_dir, run_config, take_steps, trainer_for
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.methods import ADDED
from trainer.build.parts import build_engine
from trainer.model.loading import load_tokenizer
from trainer.tuning import lstm

LSTM = ADDED["p_tuning lstm"]


def config(root, precision):
    return replace(run_config(model_dir(root), "single", "lora", micro=16), tuning=LSTM, precision=precision)


def substitutions(root, runtime, precision):
    settings = config(root, precision)
    _, built, _ = build_engine(
        settings, load_tokenizer(settings.model), data_set(root, uneven=True), precision, runtime
    )
    return built.substitutions


def types_met(monkeypatch):
    """The types of weights that LSTMs are computed with from here on."""
    met, compute = set(), torch._VF.lstm

    def noted(*args):
        met.add((args[2][0].dtype, torch.is_autocast_enabled("cpu")))
        return compute(*args)

    monkeypatch.setattr(torch._VF, "lstm", noted)
    return met


def test_lstm_without_half_precision_support_computes_in_fp32_and_the_run_says_so(tmp_path, runtime, monkeypatch):
    met = types_met(monkeypatch)
    monkeypatch.setattr(lstm, "cpu_supports_lstm_dtype", lambda dtype: False)
    trainer = trainer_for(config(tmp_path, Precision.bf16), data_set(tmp_path, uneven=True), runtime)
    found = take_steps(trainer, 3)
    assert met == {(torch.float32, False)}
    expected = take_steps(trainer_for(config(tmp_path, Precision.fp32), data_set(tmp_path, uneven=True), runtime), 3)
    assert found != expected, "the model itself is not in bf16"
    for (loss, _), (right, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-2)
    note = substitutions(tmp_path, runtime, Precision.bf16)["tuning.encoder"]
    assert note == "lstm in bf16 -> lstm in fp32 (this processor has no LSTM in bf16)"
    assert "tuning.encoder" not in substitutions(tmp_path, runtime, Precision.fp32)


def test_lstm_with_half_precision_support_computes_as_asked(tmp_path, runtime, monkeypatch):
    if not lstm.cpu_supports_lstm_dtype(torch.bfloat16):
        pytest.skip("this processor has no LSTM in bf16")
    met = types_met(monkeypatch)
    take_steps(trainer_for(config(tmp_path, Precision.bf16), data_set(tmp_path, uneven=True), runtime), 1)
    assert met == {(torch.float32, True)}  # cast by autocast
    assert "tuning.encoder" not in substitutions(tmp_path, runtime, Precision.bf16)


def test_lstm_probe_finds_what_an_older_processor_lacks():
    """oneDNN held back to AVX2, as on any x86-64 processor of the years before AVX-512."""
    code = "import torch; from trainer.tuning.lstm import cpu_supports_lstm_dtype; print(cpu_supports_lstm_dtype(torch.bfloat16))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(ONEDNN_MAX_CPU_ISA="AVX2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
