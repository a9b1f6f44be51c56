"""What only a GPU can show, in one command without a network: tests, kernels side by side, memory beside its simulation,
speed beside plain transformers. Writes `benchmarks/results/gpu_proof.md` and `.json`; at most ten minutes on one card of 80 GB.

Where there is no GPU it says so and ends well. `--dry-run` goes through it on the CPU, with a tiny model and no results.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, SingleConfig  # noqa: E402
from strategies.runtime import SIMULATED, Runtime, peak_memory_gib_by_metric  # noqa: E402
from strategies.sequence import with_sequence_parallelism  # noqa: E402
from strategies.simulation import simulated_rank  # noqa: E402
from trainer.config.parallel import ParallelConfig  # noqa: E402
from trainer.config.run import RunConfig  # noqa: E402
from trainer.model.attention import varlen_attention  # noqa: E402
from trainer.model.config import ModelConfig  # noqa: E402
from trainer.optim.config import AdamwConfig  # noqa: E402
from trainer.planner.simulate import ShapesOnly, SimulatedStep, record_steps  # noqa: E402
from trainer.planner.simulation import build_step_parts, simulate_run  # noqa: E402
from trainer.reporting.reference_speed import reference_tflops  # noqa: E402
from trainer.session.run_facts import versions  # noqa: E402
from trainer.tuning.base import FullConfig, LoraConfig  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 2**30
SIZES = {
    False: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    True: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8},
}
"""A Llama of 1.2 B parameters; for the dry run a tiny one."""
SHARED_BY = 8
"""Ranks that share a row in the proof of long documents."""
LARGEST_ERROR = 0.05
"""How far the memory of such a rank may be from its simulation."""
PEERS = ("flash_attn", "liger_kernel", "trl", "litgpt", "torchtune", "llamafactory", "axolotl")


def gpu_tests() -> dict[str, Any]:
    """`tests/gpu`: what pytest says at its end."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stdout.splitlines() if line.strip()]
    return {"passed": done.returncode == 0, "said": said[-1] if said else done.stderr[-300:]}


# -- attention kernels --------------------------------------------------------------------------------------------------


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Each document alone, by plain products; all `[1, heads, T, width]`."""
    groups, pieces = q.shape[1] // k.shape[1], []
    for start, stop in pairwise(bounds):
        part, keys, values = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]
        keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
        scores = part @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        pieces.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values)
    return torch.cat(pieces, dim=2)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    ends = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(stop - start for start, stop in pairwise(bounds))
    out, _ = varlen_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=ends, max_length_q=longest)
    return out.transpose(1, 2)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    ends = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(stop - start for start, stop in pairwise(bounds))
    rows = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    return flash_attn_varlen_func(*rows, ends, ends, longest, longest, causal=True).transpose(0, 1)[None]


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor([stop - start for start, stop in pairwise(bounds)], device=q.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    mask = create_block_mask(
        lambda b, h, i, j: (owner[i] == owner[j]) & (i >= j), None, None, bounds[-1], bounds[-1], device=q.device.type
    )
    attend: Any = torch.compile(flex_attention) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=True)


def kernels(device: torch.device) -> dict[str, Any]:
    """Largest difference of output and gradients from eager attention in float32, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0, 7, 200, 201, 512]
    base = [torch.randn(1, heads, 512, 64, generator=generator) for heads in (8, 2, 2)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def outcome(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(device, dtype).requires_grad_() for t in base]
        out = attend(*given, bounds)
        out.float().square().sum().backward()
        return [t.detach().float() for t in (out, *(g.grad for g in given if g.grad is not None))]

    exact, found = outcome(_eager, torch.float32), {}
    for name, attend in {"eager": _eager, "varlen": _varlen, "flex": _flex, "flash_attn": _flash}.items():
        try:
            made = outcome(attend, dtype)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            found[name] = {"left_out": " ".join(str(error).split())[:160]}
            continue
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, exact, strict=True))
        found[name] = {"worst": worst, "agrees": worst < 5e-2}
    return found


# -- memory and speed ---------------------------------------------------------------------------------------------------


class Drawn(ShapesOnly):
    """Small random values, so that every step is finite."""

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        return torch.randn(stop - start) * 0.02


def cases(model: Path, tokens: int, precision: Precision) -> dict[str, tuple[RunConfig, list[int]]]:
    """Runs of one process, by what they show."""

    def config(tuning: Any, checkpointing: str, accumulation: int = 1) -> tuple[RunConfig, list[int]]:
        strategy = SingleConfig(activation_checkpointing=ActivationCheckpointing(checkpointing))
        run = RunConfig(
            model=ModelConfig(path=str(model)),
            tuning=tuning,
            strategy=strategy,
            precision=precision,
            batch={"global": accumulation, "micro": 1},
            optim=AdamwConfig(lr=1e-4),
        )
        return run, [tokens]

    return {
        "full": config(FullConfig(), "none"),
        "full, 2 micro-batches": config(FullConfig(), "none", 2),
        "full, all recomputed": config(FullConfig(), "full"),
        "full, products kept": config(FullConfig(), "selective"),
        "LoRA": config(LoraConfig(rank=16), "none"),
        "LoRA, all recomputed": config(LoraConfig(rank=16), "full"),
    }


def shared_rows(model: Path, tokens: int, precision: Precision) -> dict[str, RunConfig]:
    """Runs of which `SHARED_BY` ranks share one document: with tiles of the MLP, and with kept inputs on the host as well."""
    tiles = Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full, mlp_tokens=tokens // SHARED_BY // 4)
    base = RunConfig(
        model=ModelConfig(path=str(model)),
        tuning=LoraConfig(rank=16),
        strategy=tiles,
        parallel=ParallelConfig(sequence=SHARED_BY),
        precision=precision,
        batch={"global": 1, "micro": 1},
        optim=AdamwConfig(lr=1e-4),
    )
    with_host = replace(base, strategy=replace(tiles, offload_activations=True))
    return {"tiles of the MLP": base, "tiles, and inputs of blocks on the host": with_host}


def shared_step(run: RunConfig, tokens: int, device: torch.device) -> dict[str, Any]:
    """The step of one of `SHARED_BY` ranks on this card, beside the same step simulated; the other ranks do not exist.

    torch's fake group takes their place. What it exchanges has its true size and no meaning, so memory is measured, and
    neither loss nor speed.
    """
    simulated_on = SIMULATED if device.type == "cuda" else device
    expected = simulate_run(run, [tokens], world_size=SHARED_BY, device=simulated_on)
    with simulated_rank(0, SHARED_BY, device=device) as all_ranks:
        runtime = with_sequence_parallelism(all_ranks, SHARED_BY)
        return _beside_simulation(expected, run, [tokens], runtime)


def step_of(run: RunConfig, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Peak as simulated and as measured, live and allocated; seconds of a step and what it computed."""
    return _beside_simulation(simulate_run(run, lengths), run, lengths, Runtime(0, 1, 0, 1, device, None))


def _beside_simulation(expected: SimulatedStep, run: RunConfig, lengths: list[int], runtime: Runtime) -> dict[str, Any]:
    """A real step on this device beside the simulated one."""
    device = runtime.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    measured = record_steps(build_step_parts(run, lengths, runtime, source=Drawn()), runtime)
    row = {
        "simulated_gib": expected.phase_and_peak[1].total_bytes / GIB,
        "at": str(expected.phase_and_peak[0]),
        "live_gib": measured.phase_and_peak[1].total_bytes / GIB,
        "allocated_gib": peak_memory_gib_by_metric(device)["memory_gib"],
        "host_reads": sum(measured.host_reads.values()),
        "watched_s": time.perf_counter() - began,
        "flops": expected.flops,
    }
    row["off"] = row["simulated_gib"] / row["allocated_gib"] - 1 if device.type == "cuda" else None
    return row


def speed(run: RunConfig, lengths: list[int], device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of a step of the run's engine, the median of `steps` after three."""
    from strategies.build import build_strategy
    from trainer.data.batches.collate import to_device

    runtime = Runtime(0, 1, 0, 1, device, None)
    parts = build_step_parts(run, lengths, runtime, source=Drawn())
    engine = build_strategy(parts.strategy, parts.precision, runtime).prepare(
        parts.built.step_module,
        source=parts.weight_source,
        make_optimizer=parts.make_optimizer,
        max_grad_norm=parts.max_grad_norm,
    )
    batches = [to_device(batch, device) for batch in parts.micro_batches]

    def step() -> None:
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            terms = engine.forward(batch, last=last)
            engine.backward(terms["loss"] / batch["totals"]["loss"], last=last)
        engine.step(1.0)

    return _timed(step, sum(lengths) * len(batches), device, steps)


def plain_transformers(model: Path, tokens: int, device: torch.device, steps: int) -> dict[str, Any]:
    """A loop of plain transformers with AdamW, the same model and tokens, bf16 autocast and SDPA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with device:
        net = auto.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, tokens, device, steps)


def _timed(step: Callable[[], None], tokens: int, device: torch.device, steps: int) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3 + steps):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    median = sorted(times[3:])[steps // 2]
    return {
        "step_s": median,
        "tokens_per_s": tokens / median,
        "allocated_gib": peak_memory_gib_by_metric(device)["memory_gib"],
    }


def page(facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# What a GPU showed", "", f"{facts['device']}; {facts['minutes']:.1f} minutes; {facts['versions']}.", ""]
    lines += [f"`tests/gpu`: {facts['tests']['said']}", "", "| attention | worst against eager fp32 |", "|---|---|"]
    for name, row in facts["kernels"].items():
        lines.append(
            f"| {name} | {row['worst']:.1e} |" if "worst" in row else f"| {name} | left out: {row['left_out']} |"
        )
    lines += ["", "| run | simulated GiB | live GiB | allocated GiB | tokens/s | MFU |", "|---|---|---|---|---|---|"]
    for name, row in facts["runs"].items():
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else "unknown"
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("simulated_gib", "live_gib", "allocated_gib"))
        lines.append(f"| {name} | {numbers} | {row['tokens_per_s']:,.0f} | {mfu} |")
    lines += ["", f"One of {SHARED_BY} ranks that share a row, whose other ranks torch's fake group stands for:", ""]
    lines += ["| run | simulated GiB | live GiB | allocated GiB |", "|---|---|---|---|"]
    for name, row in facts["shared_rows"].items():
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("simulated_gib", "live_gib", "allocated_gib"))
        lines.append(f"| {name} | {numbers} |")
    plain = facts["plain_transformers"]
    lines += [
        "",
        f"Plain transformers, full: {plain['tokens_per_s']:,.0f} tokens/s, {plain['allocated_gib']:.2f} GiB allocated. "
        f"Importable here: {', '.join(facts['importable']) or 'no peer'}; `make bench-gpu` measures beside those.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write; 1 where a test fails or a kernel disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model; writes nothing")
    dry = parser.parse_args().dry_run
    if not torch.cuda.is_available() and not dry:
        print("gpu-proof: no CUDA device here: nothing was measured (docs/gpu.md says what was simulated instead)")
        return 0
    began, device = time.monotonic(), torch.device("cpu" if dry else "cuda")
    facts: dict[str, Any] = {"device": "CPU" if dry else torch.cuda.get_device_name(), "versions": versions()}
    facts["importable"] = [name for name in PEERS if find_spec(name) is not None]
    facts["tests"], facts["kernels"] = gpu_tests(), kernels(device)
    tflops, _ = (None, "") if dry else reference_tflops(None, device)
    tokens, steps = (64, 1) if dry else (4096, 5)
    with tempfile.TemporaryDirectory() as place:
        from transformers import LlamaConfig

        config = LlamaConfig(**SIZES[dry], num_key_value_heads=4, vocab_size=512 if dry else 128256, pad_token_id=0)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(place)
        facts["runs"] = {}
        for name, (run, lengths) in cases(Path(place), tokens, Precision.fp32 if dry else Precision.bf16).items():
            row = step_of(run, lengths, device)
            gc.collect()
            row |= {key: value for key, value in speed(run, lengths, device, steps).items() if key not in row}
            row["mfu"] = row["flops"] / row["step_s"] / tflops / 1e12 if tflops else None
            facts["runs"][name] = row
            gc.collect()
        facts["shared_rows"] = {}
        long_row = 512 if dry else 262_144
        for name, run in shared_rows(Path(place), long_row, Precision.fp32 if dry else Precision.bf16).items():
            facts["shared_rows"][name] = shared_step(run, long_row, device)
            gc.collect()
        facts["plain_transformers"] = plain_transformers(Path(place), tokens, device, steps)
    facts["minutes"] = (time.monotonic() - began) / 60
    text = page(facts)
    print(text)
    if not dry:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu_proof.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "gpu_proof.md").write_text(text, encoding="utf-8")
    agree = all(row.get("agrees", True) for row in facts["kernels"].values())
    # Both counted by the same tracker: the card's own kernels and libraries are not in either.
    as_simulated = all(
        abs(row["live_gib"] / row["simulated_gib"] - 1) < LARGEST_ERROR for row in facts["shared_rows"].values()
    )
    return int(not (facts["tests"]["passed"] and agree and as_simulated))


if __name__ == "__main__":
    sys.exit(main())
