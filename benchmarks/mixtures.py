"""When expert parallelism pays, by the planner: `python -m benchmarks.mixtures [--parts crossover large]`.

`crossover`: the micro-batch (tokens of a rank) below which `parallel.experts=8` sends fewer bytes, and takes less time, than
gathering all experts: Qwen3-30B-A3B on eight H100 of one host. `large`: memory and seconds of a step of Kimi K2 and DeepSeek V3
with LoRA on 256 H200. Nothing is measured; every figure is of `trainer/planner`. Writes benchmarks/results/mixtures.json, which
docs/evidence/expert-parallelism.md quotes (`tests/benchmarks/test_mixtures.py` compares them).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.config.compose import compose_config
from launch.plan.command import read_plan_request
from strategies.base import Precision
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import NotSimulated
from trainer.planner.lengths import DocumentLengths
from trainer.planner.plan import PlannedJob, plan_choice
from trainer.planner.speed import MicroBatchLoad, estimate_step_time
from trainer.planner.sweep import simulate_variants
from trainer.planner.variants import RunVariant

GIB = 2**30
RESULTS = Path(__file__).parent / "results" / "mixtures.json"
QWEN = "Qwen/Qwen3-30B-A3B"
DEGREE = 8
"""Ranks of an expert group whose crossover is computed: all of the host."""
DOCUMENT = 1024
"""Tokens of a document, where attention is counted."""
KIMI_K2_SOURCE = (
    "https://github.com/MoonshotAI/Kimi-K2/blob/11062d119a82873f7f786cd2733c57d42ee65b79/README.md (layers, dense layers, hidden "
    "sizes, heads, experts); model_inspection_report.md of https://github.com/ParagEkbote/hf-model-inspector (vocabulary, "
    "dense intermediate size). Ranks and head sizes of the attention: those of DeepSeek V3, whose attention it is"
)
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "first_k_dense_replace": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Published sizes of Kimi K2 (`KIMI_K2_SOURCE`)."""


def cost_model_of(words: list[str], hardware: str, nodes: int, length: int, imbalance: float) -> tuple[Any, ...]:
    """(variant, cost model, job) of one way to run, one document of `length` tokens in a micro-batch, eight ranks a node."""
    request = read_plan_request([f"hardware={hardware}"])
    shared = ["strategy=fsdp2", "precision=bf16", "launcher=slurm", "run.device=cuda", f"data.max_length={length}"]
    config = compose_config([*words, *shared], check=False).config
    config.launcher.nodes = nodes
    config.batch |= {"global": 8 * nodes, "micro": 1}
    job = PlannedJob(
        request.card,
        Precision.bf16,
        nodes,
        8,
        8 * nodes,
        DocumentLengths.uniform(length, 1),
        expert_imbalance=imbalance,
    )
    variant = RunVariant(config, ())
    (cost_model,) = simulate_variants([variant], job, [1], request.settings, lambda *_: None)
    if isinstance(cost_model, NotSimulated):
        raise SystemExit(f"{' '.join(words)}: {cost_model.reason}")
    return variant, cost_model, job


# -- the crossover ----------------------------------------------------------------------------------------------------


def sent_bytes(cost_model: CostModel, units: float) -> float:
    """Bytes that a rank sends in a micro-batch of `units` tokens: what stays on the rank is not counted."""
    total = 0.0
    for (name, ranks, _hosts, _dtype, _when), (_calls, size) in cost_model.collective_totals.items():
        passes = 2 if "allreduce" in name else 1
        total += passes * size * (ranks - 1) / ranks
    for all_to_all in cost_model.token_all_to_alls:
        total += cost_model.all_to_all_bytes(all_to_all, units) * (all_to_all.num_ranks - 1) / all_to_all.num_ranks
    return total


def crossover(quantity: Any, gathers: CostModel, sends: CostModel) -> float:
    """The tokens of a micro-batch at which `quantity(cost model, tokens)` is equal for both, found by halving."""
    low, high = 64.0, 2.0**20
    while high - low > 1:
        middle = (low + high) / 2
        if quantity(sends, middle) < quantity(gathers, middle):
            low = middle
        else:
            high = middle
    return low


def crossovers() -> list[dict[str, Any]]:
    """A row for each tuning and recomputation: tokens below which `parallel.experts=8` is better, in bytes and in time."""
    rows = []
    for tuning in ("full", "lora"):
        for recompute in ("none", "full"):
            words = [f"model.path={QWEN}", f"tuning={tuning}", f"strategy.activation_checkpointing={recompute}"]
            models = {}
            for degree, imbalance in ((1, 1.0), (DEGREE, 1.0), (DEGREE, 2.0)):
                _, models[degree, imbalance], job = cost_model_of(
                    [*words, f"parallel.experts={degree}"], "h100_80g", 1, 4096, imbalance
                )

            def seconds(cost_model: CostModel, units: float, job: PlannedJob = job) -> float:
                load = MicroBatchLoad(units, units * min(units, DOCUMENT), 1)
                return estimate_step_time(cost_model, load, job.card, job.precision, ranks_per_node=8).total_s

            gathers = models[1, 1.0]
            rows.append(
                {
                    "tuning": tuning,
                    "recompute": recompute,
                    "bytes": round(crossover(sent_bytes, gathers, models[DEGREE, 1.0])),
                    "time_even": round(crossover(seconds, gathers, models[DEGREE, 1.0])),
                    "time_twice": round(crossover(seconds, gathers, models[DEGREE, 2.0])),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


# -- very large mixtures ----------------------------------------------------------------------------------------------


def large() -> list[dict[str, Any]]:
    """A row for each model and number of ranks of an expert group: memory of a GPU, also at worst, and seconds of a step."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(KIMI_K2), encoding="utf-8")
        for model, path in (("Kimi K2", place), ("DeepSeek V3", "deepseek-ai/DeepSeek-V3")):
            for degree in (1, 8, 16):
                words = [f"model.path={path}", "tuning=lora", "tuning.rank=16", f"parallel.experts={degree}"]
                words += ["strategy.activation_checkpointing=full"]
                variant, cost_model, job = cost_model_of(words, "h200", 32, 4096, 2.0)
                choice = plan_choice(variant, cost_model, job, 1)
                row = {
                    "model": model,
                    "parameters": cost_model.num_parameters,
                    "experts": degree,
                    "tensors_gib": round(choice.memory_peak.total_bytes / GIB, 1),
                    "card_gib": round(job.card.memory_gib, 1),
                    "fits": choice.fits,
                    "step_s": round(choice.step_time.total_s, 1),
                }
                if degree == DEGREE:
                    variant, cost_model, job = cost_model_of(words, "h200", 32, 4096, float(degree))
                    row["worst_gib"] = round(plan_choice(variant, cost_model, job, 1).memory_peak.total_bytes / GIB, 1)
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> int:
    """Compute the parts that are asked for, and write them beside those that were computed before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=["crossover", "large"], default=["crossover", "large"])
    options = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in options.parts:
        began = time.process_time()
        results[part] = {"crossover": crossovers, "large": large}[part]()
        print(f"{part}: {time.process_time() - began:.0f} CPU s in this process", file=sys.stderr)
        results["command"] = "python -m benchmarks.mixtures"
        results["kind"] = "planned by arithmetic from simulated steps, not measured"
        results["document_tokens"] = DOCUMENT
        results["kimi_k2_source"] = KIMI_K2_SOURCE
        results["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
