"""The bare loop: what a person would write by hand for these batches and nothing else. The limit that trainers are held to.

Documents of a batch lie in one row, each attends to itself in one causal call, the head sees supervised rows only, AdamW is
fused, the norm is clipped to 1. No evaluation, logging, checkpoints, or anything to choose. Run as a process of its own:

    python benchmarks/training/bare.py --model DIR --batches FILE.npz --tuning full|lora --precision fp32|bf16 --out FILE.json

`FILE.npz` holds `tokens` and `supervised` (one value a token), `documents` (length of each) and `steps` (documents a step).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, bounds: list[int], **_: Any
) -> tuple[Tensor, None]:
    """One causal call a document; in float32, whose backward pass CPUs run faster than bfloat16's."""
    dtype, pieces = query.dtype, []
    for start, stop in pairwise(bounds):
        q, k, v = (t[:, :, start:stop].float() for t in (query, key, value))
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(pieces, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def as_batches(stored: Mapping[str, np.ndarray]) -> list[tuple[Tensor, Tensor, list[int], Tensor, Tensor]]:
    """(ids [1, T], positions [1, T], bounds, supervised rows [N], their targets [N]) of each step."""
    batches, token, document = [], 0, 0
    for count in stored["steps"]:
        lengths = stored["documents"][document : document + count]
        bounds = [0, *accumulate(int(n) for n in lengths)]
        ids = torch.from_numpy(stored["tokens"][token : token + bounds[-1]].astype(np.int64))
        supervised = torch.from_numpy(stored["supervised"][token : token + bounds[-1]].astype(bool))
        supervised[bounds[:-1]] = False  # nothing predicts a first token
        rows = supervised.nonzero()[:, 0] - 1
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        batches.append((ids[None], positions[None], bounds, rows, ids[rows + 1]))
        token, document = token + bounds[-1], document + count
    return batches


class Bare:
    """The model, its optimizer, and one step."""

    def __init__(self, model_dir: str, *, tuning: str, precision: str, lr: float, rank: int = 16) -> None:
        AttentionInterface.register("bare", attend)
        self.half = precision == "bf16"
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="bare", dtype=torch.float32)
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        if tuning == "lora":
            from peft import LoraConfig, get_peft_model

            if self.half:  # as a trainer would hold a base that does not train
                model = model.to(torch.bfloat16)
            torch.manual_seed(0)
            adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, adapters)
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)

    def step(self, batch: tuple[Tensor, Tensor, list[int], Tensor, Tensor]) -> Tensor:
        """Forward, backward, clip, update; the loss."""
        ids, positions, bounds, rows, targets = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            hidden = self.decoder(input_ids=ids, position_ids=positions, bounds=bounds, use_cache=False)[0]
            logits = self.head(hidden[0, rows])
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train(model_dir: str, batches: list[Any], *, tuning: str, precision: str, lr: float) -> dict[str, Any]:
    """Take one step a batch; losses, CPU seconds of each step, and tokens."""
    loop = Bare(model_dir, tuning=tuning, precision=precision, lr=lr)
    losses, ends = [], [time.process_time()]
    for batch in batches:
        losses.append(loop.step(batch))
        ends.append(time.process_time())
    return {
        "losses": torch.stack(losses).tolist(),
        "seconds": [b - a for a, b in pairwise(ends)],
        "tokens": [b[0].shape[1] for b in batches],
        "start_s": ends[0],
    }


def main() -> None:
    """One measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--batches", "--tuning", "--precision", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batches = as_batches(np.load(args.batches))
    result = train(args.model, batches, tuning=args.tuning, precision=args.precision, lr=args.lr)
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
