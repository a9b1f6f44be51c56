"""What shows a GPU writes its page; here of a tiny model on the CPU."""

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu_proof
from strategies.base import Precision


def test_gpu_proof_simulates_and_measures_a_run_and_writes_its_page(tmp_path):
    config = LlamaConfig(**gpu_proof.SIZES[True], num_key_value_heads=4, vocab_size=512, pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    run, lengths = gpu_proof.cases(tmp_path, 32, Precision.fp32)["LoRA"]
    device = torch.device("cpu")
    row = gpu_proof.step_of(run, lengths, device)
    assert row["simulated_gib"] == pytest.approx(row["live_gib"], rel=0.05) and row["allocated_gib"] > row["live_gib"]
    row |= {"tokens_per_s": 1234.5, "mfu": 0.4}
    facts = {"device": "a card", "minutes": 1.0, "versions": {}, "tests": {"said": "9 passed"}, "importable": []}
    facts |= {"kernels": {"varlen": {"worst": 1e-3}, "flex": {"left_out": "not here"}}, "runs": {"LoRA": row}}
    shared = gpu_proof.shared_step(
        gpu_proof.shared_rows(tmp_path, 512, Precision.fp32)["tiles of the MLP"], 512, device
    )
    assert shared["simulated_gib"] == pytest.approx(shared["live_gib"], rel=gpu_proof.LARGEST_ERROR)
    facts["shared_rows"] = {"tiles": shared}
    said = gpu_proof.page(facts | {"plain_transformers": {"tokens_per_s": 1.0, "allocated_gib": 2.0}})
    assert f"| tiles | 0.00 | 0.00 | {shared['allocated_gib']:.2f} |" in said
    assert f"| LoRA | 0.00 | 0.00 | {row['allocated_gib']:.2f} | 1,234 | 40.0% |" in said
