"""The limit: a loop with nothing in it that the mathematics does not need. No evaluation, no checkpoints, no options.

Documents of a batch are concatenated into one row without padding, attention is one causal call a document, the head and
the loss are computed at supervised positions only, AdamW is fused, gradients are clipped to norm 1. In bf16 the weights
stay in float32 under autocast; attention on CPUs runs in float32, which is faster there. On GPUs attention is torch's
variable-length kernel in half precision. Nothing of shardtune is used.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "bare_varlen"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, bounds: list[int], **_: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each document: q `[1, H, T, D]`, k and v `[1, G, T, D]` -> `[1, T, H, D]`."""
    grouped = query.shape[1] != key.shape[1]
    kind = value.dtype  # under autocast the rotary embedding leaves the other two in float32
    if query.is_cuda and kind in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1).to(kind).contiguous() for t in (query, key, value))
        where = torch.tensor(bounds, dtype=torch.int32, device=q.device)
        longest = max(stop - start for start, stop in pairwise(bounds))
        out: Any = varlen_attn(q, k, v, where, where, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
        return out[None], None
    pieces = []
    with torch.autocast(query.device.type, enabled=False):  # autocast would take attention back to bfloat16
        for start, stop in pairwise(bounds):
            q, k, v = (t[:, :, start:stop].float() for t in (query, key, value))
            pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous().to(kind), None


def build(path: str | Path, tuning: str, precision: str = "fp32", device: str = "cpu", *, seed: int = 42) -> Any:
    """The model of a directory, with peft's LoRA (rank 16, alpha 32, all linear layers) where asked for.

    What trains is float32; in bf16 the base that LoRA freezes is bfloat16.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(NAME, attention)  # type: ignore[arg-type]
    kind = torch.bfloat16 if tuning == "lora" and precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation=NAME)
    if tuning == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    return model.to(device).train()


def concatenate(rows: list[dict[str, list[int]]], device: str) -> dict[str, Any]:
    """One row of all documents: ids and restarting positions `[1, T]`, boundaries, supervised rows and their targets."""
    ids, positions, rows_at, targets, bounds = [], [], [], [], [0]
    for row in rows:
        start, labels = bounds[-1], row["labels"]
        ids += row["input_ids"]
        positions += range(len(labels))
        learned = [index for index in range(1, len(labels)) if labels[index] != -100]
        rows_at += [start + index - 1 for index in learned]
        targets += [labels[index] for index in learned]
        bounds.append(start + len(labels))
    made = {"ids": [ids], "positions": [positions], "rows": rows_at, "targets": targets}
    return {name: torch.tensor(value, device=device) for name, value in made.items()} | {"bounds": bounds}


def loss_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy over the supervised positions of the batch, a 0-d float32 tensor."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(
        input_ids=batch["ids"], position_ids=batch["positions"], bounds=batch["bounds"], use_cache=False
    ).last_hidden_state
    logits = inner.lm_head(hidden[0, batch["rows"]])
    return F.cross_entropy(logits.float(), batch["targets"])


class Loop:
    """A model's optimizer, and one step."""

    def __init__(self, model: Any, *, lr: float, precision: str = "fp32", device: str = "cpu") -> None:
        self.model, self.precision, self.device = model, precision, device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)

    def step(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, update; the loss, and the norm before clipping."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = loss_of(self.model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


def train(
    model: Any,
    steps: list[list[dict[str, list[int]]]],
    *,
    lr: float,
    precision: str = "fp32",
    device: str = "cpu",
    each: Callable[[Tensor, Tensor], None] = lambda loss, norm: None,
) -> None:
    """One optimizer step for each list of documents; `each` is given the loss and the norm before clipping."""
    loop = Loop(model, lr=lr, precision=precision, device=device)
    for rows in steps:
        each(*loop.step(concatenate(rows, device)))


def main() -> None:
    """Steps over a JSON file of lists of documents, in a process of its own: its start and its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--batches", "--tuning", "--precision", "--out"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = json.loads(Path(args.batches).read_text(encoding="utf-8"))
    model = build(args.model, args.tuning, args.precision)
    start = time.process_time()
    train(model, steps, lr=1e-3, precision=args.precision)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(args.out).write_text(json.dumps({"start_s": start, "peak_mib": peak}), encoding="utf-8")


if __name__ == "__main__":
    main()
