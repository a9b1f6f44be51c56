"""Run by the Python of llm-compressor's own environment, which pins another transformers: `python compress.py <job.json>`.

The job says `model`, `to`, `scheme`, `rows` (token ids that it is calibrated on) and `probe` (token ids). Written are the model
into `to`, and beside the job `probe.safetensors`: what the model computes on the probe, `logits [T, V]`. Imports nothing of
ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CALIBRATED_SCHEMES = ("W4A16", "W8A8")
"""Schemes whose rounding is fitted to rows (GPTQ, Frantar et al. 2023); others look at the weights alone."""


def main(job_file: Path) -> None:
    """Quantise the model that a job names, save it, and write its logits on the probe beside the job file.

    Runs in llm-compressor's own Python. The job: `{"model": directory, "to": directory, "scheme": "W4A16", "rows": token ids
    to calibrate on, "probe": token ids}`. The probe is a fixed sentence, with which the stored model is compared.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    job: dict[str, Any] = json.loads(job_file.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, local_files_only=True)
    is_calibrated = job["scheme"] in CALIBRATED_SCHEMES
    # GPTQ fits the rounding to rows; the other modifier looks at the weights alone.
    modifier_class = GPTQModifier if is_calibrated else QuantizationModifier
    modifier = modifier_class(targets="Linear", scheme=job["scheme"], ignore=["lm_head"])
    calibration: dict[str, Any] = {}
    if is_calibrated:
        rows = job["rows"]
        # Nothing is padded: each row is attended to in full.
        attention_masks = [[1] * len(row) for row in rows]
        calibration = {
            "dataset": Dataset.from_dict({"input_ids": rows, "attention_mask": attention_masks}),
            "num_calibration_samples": len(rows),
            "max_seq_length": max(map(len, rows)),
        }
    oneshot(model=model, recipe=modifier, **calibration)
    with torch.no_grad():
        logits = model(torch.tensor([job["probe"]], device=model.device)).logits[0].float().cpu()
    save_file({"logits": logits.contiguous()}, job_file.with_name("probe.safetensors"))
    model.save_pretrained(job["to"], save_compressed=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
