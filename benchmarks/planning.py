"""Plans against published measurements of GPU memory and speed: `python -m benchmarks.planning known.csv [--rows one-gpu]`.

The table has a row a measurement, with its conditions in columns (id, model, method, strategy, gpus, gpu, seq, micro_batch,
grad_accum, precision, act_ckpt, lora_rank, peak_gib, tokens_per_s_per_gpu, notes). Each is planned as this trainer would run
it, and then (`estimate_peer_memory`) as its own trainer held it, which is `plan.theirs` of `shardtune plan`; nothing is
fitted to the table. Writes benchmarks/results/planning.json, worst first; `python docs/make_planning.py` makes the
page's tables of it.
`--no-fit no_fit.csv` plans runs of one GPU that died of memory in place of the table, and writes whether they are predicted to
fit to benchmarks/results/planning_no_fit.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.config.compose import compose_config
from launch.plan.command import read_plan_request
from strategies.base import Precision
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import NotSimulated
from trainer.planner.hardware import device_memory_fit
from trainer.planner.lengths import DocumentLengths
from trainer.planner.peer_memory import LOSS_BYTES_PER_LOGIT, PeerSetting, ShardCounts, estimate_peer_memory
from trainer.planner.plan import PlannedJob
from trainer.planner.speed import MicroBatchLoad, estimate_step_time
from trainer.planner.sweep import simulate_variants
from trainer.planner.variants import RunVariant

GIB = 2**30
RESULTS = Path(__file__).parent / "results" / "planning.json"
NO_FIT = RESULTS.with_name("planning_no_fit.json")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
}
LLAMA |= {"torch_dtype": "bfloat16", "pad_token_id": 0, "rms_norm_eps": 1e-5}


def _sizes(hidden: int, inner: int, blocks: int, heads: int, words: int, **more: Any) -> dict[str, Any]:
    made = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
    }
    return LLAMA | made | {"vocab_size": words} | more


def _as(kind: str, cls: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return sizes | {"model_type": kind, "architectures": [cls]} | more


_QWEN = ("qwen2", "Qwen2ForCausalLM")
LLAMA_3 = _sizes(4096, 14336, 32, 32, 128256)
MODELS: dict[str, dict[str, Any]] = {
    "Meta-Llama-3-8B": LLAMA_3,
    "Kempner-Llama-7B": LLAMA_3,
    "Llama-2-70B": _sizes(8192, 28672, 80, 64, 32000),
    "Mistral-7B-v0.1": _as("mistral", "MistralForCausalLM", _sizes(4096, 14336, 32, 32, 32000), sliding_window=4096),
    "Mixtral-8x7B-Instruct-v0.1": _as(
        "mixtral", "MixtralForCausalLM", _sizes(4096, 14336, 32, 32, 32000), num_local_experts=8, num_experts_per_tok=2
    ),
    "PowerLM-3b": _as(
        "granite",
        "GraniteForCausalLM",
        _sizes(2304, 9216, 40, 36, 49152, num_key_value_heads=36, tie_word_embeddings=True),
    ),
    "gpt_bigcode-santacoder": {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "n_embd": 2048,
        "n_head": 16,
        "n_inner": 8192,
        "n_layer": 24,
        "n_positions": 2048,
        "multi_query": True,
        "vocab_size": 49280,
        "pad_token_id": 0,
    },
    "Qwen2.5-0.5B": _as(*_QWEN, _sizes(896, 4864, 24, 14, 151936, num_key_value_heads=2, tie_word_embeddings=True)),
    "Qwen2.5-1.5B": _as(*_QWEN, _sizes(1536, 8960, 28, 12, 151936, num_key_value_heads=2, tie_word_embeddings=True)),
    "Qwen2.5-3B": _as(*_QWEN, _sizes(2048, 11008, 36, 16, 151936, num_key_value_heads=2, tie_word_embeddings=True)),
    "Qwen2.5-7B": _as(*_QWEN, _sizes(3584, 18944, 28, 28, 152064, num_key_value_heads=4)),
}
CARDS = {"A100-80GB": "a100_80g", "H200-141GB": "h200", "RTX4080-16GB": "rtx4090"}
"""The card of each row; an RTX 4080 has no file, and its memory is of no account here."""
STRATEGY = {"single": "single", "FSDP1 FULL_SHARD": "fsdp2", "FSDP2": "fsdp2"}
"""What stands in for the strategy of a row; rows of others (tensor and pipeline parallel) are left out."""


@dataclass(frozen=True, slots=True)
class Question:
    """Rows that one simulation answers, at their micro-batches."""

    model: str
    strategy: str
    ranks: int
    tuning: str
    quantised: str
    recompute: str
    length: int
    accumulation: int
    gpu: str


def question(row: dict[str, str]) -> Question | None:
    """What to simulate for a row; None where the plan has no equal for it."""
    if row["model"] not in MODELS or row["strategy"] not in STRATEGY:
        return None
    quantised = "nf4" if row["method"] == "QLoRA" else "none"  # with double quantisation, as all rows' bytes say
    tuning = "full" if row["method"].startswith("full") else "lora"
    accumulation = min(2, int(row["grad_accum"] or 1))
    return Question(
        row["model"],
        STRATEGY[row["strategy"]],
        int(row["gpus"]),
        tuning,
        quantised,
        row["act_ckpt"],
        int(row["seq"]),
        accumulation,
        row["gpu"],
    )


def forms(questions: list[Question], place: Path) -> Iterator[tuple[Question, CostModel | NotSimulated, PlannedJob]]:
    """Each with its form, or why there is none, as they are found."""
    for asked in questions:
        path = place / asked.model
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(MODELS[asked.model]), encoding="utf-8")
        request = read_plan_request([f"hardware={CARDS[asked.gpu]}"])
        card, settings = request.card, request.settings
        words = [f"model.path={path}", f"strategy={asked.strategy}", f"tuning={asked.tuning}", "precision=bf16"]
        words += [f"strategy.activation_checkpointing={asked.recompute}", "launcher=slurm", "run.device=cuda"]
        if asked.tuning == "lora":
            targets = "c_attn,c_proj" if "santacoder" in asked.model else "q_proj,k_proj,v_proj,o_proj"
            words += ["tuning.rank=16", f"tuning.targets=[{targets}]"]
        if asked.quantised != "none":
            words += ["model.quantisation=nf4"]
        if asked.strategy == "fsdp2":
            words += ["strategy.defer_sync=true"]
        config = compose_config(words, check=False).config
        config.batch |= {"global": asked.ranks * asked.accumulation, "micro": 1}
        job = PlannedJob(
            card, Precision.bf16, 1, asked.ranks, config.batch["global"], DocumentLengths.uniform(asked.length, 1)
        )
        (found,) = simulate_variants(
            [RunVariant(config, ())], job, [asked.accumulation], replace(settings, workers=1), lambda *_: None
        )
        yield asked, found, job


def theirs_of(row: dict[str, str]) -> list[PeerSetting]:
    """What the row's trainer holds beside what this one does."""
    found = [PeerSetting.pure_bf16] if "pure bf16" in row["precision"] and row["method"].startswith("full") else []
    if "liger" in row["notes"]:
        return found
    if "kbit" in row["notes"]:
        return [*found, PeerSetting.fp32_head]
    fused = "foak" in row["notes"] or "compile" in row["notes"]
    return [*found, PeerSetting.fused_loss if fused else PeerSetting.stock_loss]


def holds_logits(row: dict[str, str]) -> bool:
    """Whether the row's trainer holds logits of all tokens."""
    return any(each in LOSS_BYTES_PER_LOGIT for each in theirs_of(row))


def answers(row: dict[str, str], form: CostModel, job: PlannedJob) -> dict[str, Any]:
    """What is predicted for a row: as this trainer would run, and as the row's did."""
    micro = int(row["micro_batch"] or 1)
    tokens = micro * int(row["seq"])
    units = micro if form.size_is_in_rows else tokens
    taken, shards = form.memory_peak_at(units), int(row["gpus"])
    other = estimate_peer_memory(
        form, units, tokens * form.num_vocabulary_rows, theirs_of(row), ShardCounts(shards, shards, shards)
    )
    step = estimate_step_time(
        form,
        MicroBatchLoad(units, micro * int(row["seq"]) ** 2, 1),
        job.card,
        job.precision,
        ranks_per_node=job.ranks_per_node,
    )
    return {
        "predicted_gib": taken.total_bytes / GIB,
        "as_theirs_gib": other.total / GIB,
        "peak_at": str(taken.phase),
        "tokens_per_s_per_gpu": tokens / step.total_s,
    }


def as_published(row: dict[str, str]) -> dict[str, str]:
    """A row of runs that died, with the conditions that all rows of its source share, in the columns of the table."""
    config = row["framework_config"]
    more = ["liger"] if "liger" in config else []
    more += ["foak"] if "foak" in config else []
    more += ["kbit"] if config == "baseline-peft-bnb" else []
    shared = {"grad_accum": "1", "act_ckpt": "full", "precision": "bf16", "notes": " ".join(more)}
    return row | shared | ({"precision": "pure bf16"} if row["method"] == "full" else {})


def judged(row: dict[str, str], answer: dict[str, Any], job: PlannedJob) -> dict[str, Any]:
    """Whether a run that died would have been said to fit, as this trainer runs it and as its own did."""
    made: dict[str, Any] = {
        key: row[key] for key in ("id", "model", "method", "seq", "micro_batch", "framework_config")
    }
    made |= {"holds_logits": holds_logits(row), "card_gib": job.card.memory_gib}
    for key in ("predicted_gib", "as_theirs_gib"):
        needed = device_memory_fit(round(answer[key] * GIB), 0, job.card.memory_gib).needed_bytes / GIB
        made |= {key: round(needed, 2), key.replace("_gib", "_fits"): needed <= job.card.memory_gib}
    return made


def own_kind(row: dict[str, str]) -> bool:
    """Whether a row is of one GPU and of a trainer that, like this one, holds no logits and adapts a frozen base."""
    return row["strategy"] == "single" and not holds_logits(row) and "LoRA" in row["method"]


def main(argv: list[str]) -> int:
    """Plan every row, print the worst, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--no-fit", action="store_true", help="the table is of runs that died of memory")
    parser.add_argument("--rows", choices=["all", "one-gpu", "own"], default="all")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(argv)
    rows = list(csv.DictReader(options.table.open()))
    if options.no_fit:
        rows = [as_published(row) for row in rows if row["strategy"] == "single"]
    if options.rows != "all":
        rows = [row for row in rows if row["strategy"] == "single" and (options.rows == "one-gpu" or own_kind(row))]
    questions = dict.fromkeys(asked for row in rows if (asked := question(row)) is not None)
    made, left_out, started = [], [], time.time()
    with tempfile.TemporaryDirectory() as place:
        for asked, form, job in forms(list(questions), Path(place)):
            outcome = form.reason if isinstance(form, NotSimulated) else "done"
            print(f"{time.time() - started:6.0f} s {asked}: {outcome}", file=sys.stderr)
            for row in rows:
                if question(row) != asked:
                    continue
                if isinstance(form, NotSimulated):
                    left_out.append({"id": row["id"], "why": form.reason})
                elif options.no_fit:
                    made.append(judged(row, answers(row, form, job), job))
                else:
                    made.append(_compared(row, answers(row, form, job)))
    left_out += [{"id": row["id"], "why": "no equal strategy or model"} for row in rows if question(row) is None]
    made.sort(key=lambda one: one["as_theirs_gib"] if options.no_fit else -abs(one["off_percent"]))
    (options.results or (NO_FIT if options.no_fit else RESULTS)).write_text(
        json.dumps({"rows": made, "left_out": left_out}, indent=1) + "\n", encoding="utf-8"
    )
    print(*(["written"] if options.no_fit else summary(made)), sep="\n")
    return 0


def _compared(row: dict[str, str], answer: dict[str, Any]) -> dict[str, Any]:
    measured = float(row["peak_gib"])
    said = {
        name: row[name] for name in ("id", "model", "method", "strategy", "gpus", "seq", "micro_batch", "precision")
    }
    speed = float(row["tokens_per_s_per_gpu"] or 0)
    return said | {
        "own_kind": own_kind(row),
        "measured_gib": measured,
        **{name: value if isinstance(value, str) else round(value, 2) for name, value in answer.items()},
        "off_percent": round(100 * (answer["as_theirs_gib"] / measured - 1), 1),
        "measured_tokens_per_s_per_gpu": speed or None,
        "speed_off_percent": round(100 * (answer["tokens_per_s_per_gpu"] / speed - 1), 1) if speed else None,
    }


def summary(made: list[dict[str, Any]]) -> list[str]:
    """Medians and worsts by group, as lines."""
    groups = {
        "adapters on one GPU, no logits held": [one for one in made if one["own_kind"]],
        "others on one GPU": [one for one in made if one["strategy"] == "single" and not one["own_kind"]],
        "several GPUs": [one for one in made if one["strategy"] != "single"],
    }
    lines = []
    for name, of in groups.items():
        if of:
            off = [abs(one["off_percent"]) for one in of]
            lines.append(f"{name}: {len(of)} rows, median {statistics.median(off):.1f} % off, worst {max(off):.1f} %")
            lines[-1] += f" (signed median {statistics.median(one['off_percent'] for one in of):+.1f} %)"
        speeds = [one["speed_off_percent"] for one in of if one["speed_off_percent"] is not None]
        if speeds:
            lines.append(
                f"  tokens/s: signed median {statistics.median(speeds):+.1f} %, {min(speeds):+.1f} to {max(speeds):+.1f} %"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
