"""Benchmark of generation: the sharded writer of evaluation beside plain `transformers.generate`, in CPU seconds a token.

    python benchmarks/generation.py [model directory] [--ranks 1,2] [--rounds 7] [--prompts 32] [--new 32] [--batch 8]

Each number of ranks is one job, in whose processes both write the same prompts, in the same batches, to the same length, in turn,
the order turned round each time. One thread a process, pinned to a core. `--matmul`: for both torch's own library of float32
products (`blas`), or for ours the one that an evaluation here would choose for itself (`auto`). Makes
`benchmarks/results/generation.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

RESULTS = HERE / "results" / "generation.json"
STRATEGIES = {1: "single", 2: "fsdp2", 4: "fsdp2"}
PLAIN = "transformers.generate"
OURS = "shardtune"
BLOCKS = "shardtune, weights gathered block by block"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a model directory; default: the 16.9 M Llama of the training benchmark"
    )
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--matmul", default="blas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    """Start a job for each number of ranks, and write what they found."""
    args = parse()
    if "RANK" in os.environ:
        return rank(args)
    from environments import WORK, hardware

    model = args.model or str(made_model(WORK))
    found = []
    for ranks, matmul in ((int(ranks), matmul) for matmul in args.matmul.split(",") for ranks in args.ranks.split(",")):
        out = WORK / f"generation-{ranks}-{matmul}.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            __file__,
            model,
        ]
        command += [f"--{name}={getattr(args, name)}" for name in ("rounds", "prompts", "new", "batch")]
        command += [f"--matmul={matmul}", f"--out={out}"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found.append(json.loads(out.read_text(encoding="utf-8")))
    from importlib.metadata import version

    about = {name: version(name) for name in ("torch", "transformers")}
    settings = {name: getattr(args, name) for name in ("rounds", "prompts", "new", "batch")}
    name = args.model or "Llama of 16.9 M parameters"
    result = {"hardware": hardware(), "versions": about, "model": name, **settings, "jobs": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return 0


def made_model(work: Path) -> Path:
    """A Llama of 16.9 M parameters drawn from a seed, with its tokenizer; made once."""
    from training.inputs import SMALL, make

    inputs = make(work / "inputs-16.9M", SMALL)
    return next(path.parent for path in sorted(inputs.rglob("config.json")))


def rank(args: argparse.Namespace) -> int:
    """One process of a job."""
    place, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[place % len(cores)]})
    import torch
    import transformers

    from launch.evaluate.arguments import parse_evaluate_arguments
    from launch.evaluate.plan import plan_evaluation
    from strategies.build import resolve_precision
    from strategies.runtime import gather_objects
    from trainer.build.parts import build_engine
    from trainer.model.loading import load_tokenizer
    from trainer.run import prepare_data_and_meet_ranks
    from trainer.session.attempt import open_rank_of_job
    from trainer.session.evaluators import model_interface_for_run

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = args.out.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    rows = work / f"rows-{place}.jsonl"  # a task with a row, which asks nothing: it is what an evaluation starts with
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    words = [
        f"model.path={args.model}",
        f"to={work}",
        f"strategy={STRATEGIES[ranks]}",
        "precision=fp32",
        "run.threads=1",
    ]
    words += [
        "run.device=cpu",
        f"data.cache_dir={work}/cache",
        f"launcher.processes={ranks}",
        f"evaluation.batch={args.batch}",
    ]
    words += ["evaluation.tasks.one.kind=exact_match", f"evaluation.tasks.one.path={rows}", f"run.matmul={args.matmul}"]
    config = plan_evaluation(parse_evaluate_arguments(words)).config
    with open_rank_of_job(work / "job", config.run.lease_s) as (request, where):
        where.set_run_dir(work / "job", place)
        tokenizer = load_tokenizer(config.model)
        data, _, _, runtime = prepare_data_and_meet_ranks(config, tokenizer, request, where)
        engine, built, _ = build_engine(config, tokenizer, data, resolve_precision(config.precision, runtime), runtime)
        writer = model_interface_for_run(
            config, data, built, tokenizer, engine, runtime, lambda: False
        ).answer_generator
        writer.generation_config.min_new_tokens = args.new  # every answer has the same length
        prompts = drawn(args.prompts, len(tokenizer))
        sides = sides_of(args, writer, engine, prompts, place, ranks)
        taken = {name: [] for name in sides}
        texts = {name: run() for name, run in sides.items()}  # warm
        for turn in range(args.rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                gather_objects(0, runtime)  # begin together
                began = time.process_time()
                sides[name]()
                taken[name].append(sum(gather_objects(time.process_time() - began, runtime)))
        threads = torch.get_num_threads()
        same = {name: share(gather_objects(texts[PLAIN], runtime), texts[name]) for name in sides if name != PLAIN}
        if place == 0:
            tokens = args.prompts * args.new
            per = {name: [1000 * each / tokens for each in found] for name, found in taken.items()}
            job = {
                "ranks": ranks,
                "matmul": args.matmul,
                "strategy": STRATEGIES[ranks],
                "threads": threads,
                "cpu_ms_per_token": per,
                "same": same,
            }
            args.out.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    return 0


def drawn(number: int, vocabulary: int) -> list[list[int]]:
    """Prompts of 8 to 71 random tokens; the same every time."""
    import torch

    generator = torch.Generator().manual_seed(11)
    return [
        torch.randint(10, vocabulary - 10, (8 + (13 * n) % 64,), generator=generator).tolist() for n in range(number)
    ]


def sides_of(
    args: argparse.Namespace, writer: Any, engine: Any, prompts: list[list[int]], place: int, ranks: int
) -> dict[str, Callable[[], dict[int, list[int]]]]:
    """What is measured, by name: each writes this rank's share of the prompts, and returns new tokens by prompt."""
    import copy
    from unittest.mock import patch

    import torch
    from transformers import AutoModelForCausalLM

    from trainer.evaluation import generate
    from trainer.evaluation.base import DecodingConfig
    from trainer.evaluation.full_weights import GatherDecision
    from trainer.evaluation.likelihood import pad_sequences, padding_mask

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    how = copy.deepcopy(writer.generation_config)
    how.max_new_tokens, how.max_length, how.do_sample = args.new, None, False
    how.temperature = how.top_p = how.top_k = None
    how.pad_token_id = writer.tokenizer.pad_token_id
    lengths = [len(prompt) + args.new for prompt in prompts]
    mine = [turn for turn in generate.batches_of_rank(lengths, place, ranks, max_rows=args.batch) if turn]

    def plain() -> dict[int, list[int]]:
        """As somebody writes it by hand: the same batches, padded on the left, each rank a model of its own."""
        found = {}
        for turn in mine:
            some = [prompts[row] for row in turn]
            ids, mask = pad_sequences(some, writer.tokenizer.pad_token_id, left=True), padding_mask(some, left=True)
            with torch.no_grad():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            found |= dict(zip(turn, out[:, ids.shape[1] :].tolist(), strict=True))
        return found

    def ours() -> dict[int, list[int]]:
        return {
            one.prompt_index: one.ids
            for one in writer.generate_answers(engine, prompts, DecodingConfig(max_new_tokens=args.new))
        }

    def by_blocks() -> dict[int, list[int]]:
        with patch.object(
            generate, "decide_weight_gathering", lambda *_: GatherDecision(True, False, "block by block")
        ):
            return ours()

    return {PLAIN: plain, OURS: ours, **({BLOCKS: by_blocks} if ranks > 1 else {})}


def share(plain: list[dict[int, list[int]]], ours: dict[int, list[int]]) -> float:
    """The share of prompts to which both wrote the very same tokens."""
    every = {row: ids for part in plain for row, ids in part.items()}
    return sum(every[row] == ids for row, ids in ours.items()) / len(every)


def page(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Generation",
        "",
        "The table compares the generation code of shardtune's evaluations with `transformers.generate`. Setup:",
        "",
        f"- {result['prompts']} prompts of 8 to 71 tokens, {result['new']} new tokens each, greedy decoding, batches of "
        f"{result['batch']} rows, float32.",
        f"- {result['model']}, {result['hardware']}, torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}.",
        f"- Times are CPU milliseconds per new token for all ranks together, with one pinned thread per rank: the median of "
        f"{result['rounds']} rounds. The ratio is computed in each round. The table has its median, lowest and highest value.",
        "",
        "| ranks | strategy | generated by | library of float32 products | CPU ms per token | relative to transformers | "
        "identical tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in result["jobs"]:
        per = job["cpu_ms_per_token"]
        for name, found in per.items():
            ratios = [each / other for each, other in zip(found, per[PLAIN], strict=True)]
            ratio = "1" if name == PLAIN else f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            same = "" if name == PLAIN else f"{job['same'][name]:.0%}"
            strategy = "a model on each rank" if name == PLAIN else job["strategy"]
            products = "blas" if name == PLAIN else job["matmul"]
            lines.append(
                f"| {job['ranks']} | {strategy} | {name} | {products} | {median(found):.2f} | {ratio} | {same} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
