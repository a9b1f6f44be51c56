"""The curves of real runs of the command line, digit for digit: `python -m tests.curves write <file>`, later `compare <file>`.

For each objective under `single` (one process), `fsdp2` and `zero2` (two): four steps, full tuning and LoRA in turns, an
evaluation before and after. Only what a user can see takes part (words, files, metrics.jsonl), so that the same script runs
before and after a change of the code. Curves belong to one machine: another processor rounds otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers.models import tiny_model_dir
from tests.helpers.seq2seq import seq2seq_dir
from tests.helpers.tokenizers import WORDS, chat_rows, pair_rows, tiny_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
TIMES = {
    *("tokens_per_s", "supervised_tokens_per_s", "tokens_per_s_per_rank", "mfu", "memory_gib", "memory_reserved_gib"),
    *("data_wait_s", "step_s", "time", "blocks_s", "blocks_s/worst", "blocks_s/rank"),
    *("written_tokens_per_s", "write_s", "reward_s", "look_back_s", "train_s"),
}
"""What of a row depends on the hour."""
VERSION = "version"
"""Of the file: its first row has it since the files have versions."""
CHAT = "data.path=chat.jsonl data.eval_path=chat_eval.jsonl"
PAIRS = "data.path=pairs.jsonl data.eval_path=pairs_eval.jsonl"
GENERAL = "data.sources.own.path=chat.jsonl data.sources.general.path=general.jsonl data.sources.general.replay=true"
CASES = {
    "sft": f"{CHAT} tuning=lora",
    "sft full, packed": f"{CHAT} data.packing=true data.max_length=128",
    "sft, cut and mixed": "data.sources.a.path=chat.jsonl data.sources.a.weight=2 data.sources.b.path=general.jsonl "
    "data.sources.b.weight=1 data.max_length=48 data.over_length=split data.eval_share=0.1",
    "sft, held": f"{GENERAL} data.eval_path=chat_eval.jsonl objective.forgetting.kl_weight=0.5",
    "pretrain": "data.path=texts.jsonl data.eval_share=0.1 objective=pretrain",
    "classification": "data.path=labels.jsonl data.eval_share=0.2 objective=classification objective.class_weights=balanced",
    "several labels": "data.path=many.jsonl data.eval_share=0.2 objective=classification objective.multi_label=true tuning=lora",
    "seq2seq": f"model.path=t5 {CHAT.replace('chat', 'answers')} objective=seq2seq data.max_length=128",
    "dpo": f"{PAIRS} objective=dpo tuning=lora",
    "dpo, recorded": f"{PAIRS} objective=dpo objective.loss_type=ipo",
    "orpo": f"{PAIRS} objective=orpo",
    "simpo": f"{PAIRS} objective=simpo tuning=lora",
    "reward": f"{PAIRS} objective=reward",
    "kto": "data.path=thumbs.jsonl data.eval_path=thumbs_eval.jsonl objective=kto tuning=lora",
    "kto of pairs, recorded": f"{PAIRS} objective=kto",
    "grpo": "data.path=prompts.jsonl objective=grpo objective.rewards=[f1] objective.group_size=4 objective.kl.weight=0.1 "
    "objective.rollout.max_new_tokens=12",
    "distillation": f"{CHAT} objective=distillation objective.teacher.path=teacher objective.sft_weight=0.3 tuning=lora",
}
STRATEGIES = ("single", "fsdp2", "zero2")
COMMON = (
    "model.path=llama batch.global=8 batch.micro=2 budget.steps=4 optim.lr=1e-3 logging.wandb=disabled run.device=cpu "
    "run.threads=1 run.matmul=blas precision=fp32 data.cache_dir=cache evaluation.batch=4 evaluation.every_steps=0 data.workers=1"
)


def write_site(site: Path) -> None:
    """Models and data of every kind, random but the same each time."""
    tokenizer = tiny_tokenizer()
    for name, seed in (("llama", 0), ("teacher", 1)):
        tiny_model_dir(site / name, vocab_size=len(tokenizer) + 10, seed=seed)
        tokenizer.save_pretrained(site / name)
    seq2seq_dir(site)
    words = WORDS.split()
    for suffix, num, seed in (("", 48, 0), ("_eval", 10, 1)):
        chats, pairs = chat_rows(num, seed=seed), pair_rows(num, seed=seed)
        write_jsonl(site / f"chat{suffix}.jsonl", chats)
        write_jsonl(site / f"pairs{suffix}.jsonl", pairs)
        answers = [{"prompt": f"{row['prompt']} ", "completion": row["chosen"]} for row in pairs]
        write_jsonl(site / f"answers{suffix}.jsonl", answers)
        thumbs = [{**row, "label": number % 3 != 0} for number, row in enumerate(answers)]
        write_jsonl(site / f"thumbs{suffix}.jsonl", thumbs)
    write_jsonl(site / "general.jsonl", chat_rows(24, seed=2))
    write_jsonl(site / "prompts.jsonl", [{"prompt": row["prompt"], "answer": row["chosen"]} for row in pair_rows(24)])
    texts = [{"text": " ".join(turn["content"] for turn in row["messages"])} for row in chat_rows(48, seed=3)]
    write_jsonl(site / "texts.jsonl", texts)
    labels = [{**row, "label": ("fox", "dog", "hen")[number % 7 % 3]} for number, row in enumerate(texts)]
    write_jsonl(site / "labels.jsonl", labels)
    many = [{**row, "label": [w for w in words[:4] if row["text"].count(w) > 1]} for row in texts]
    write_jsonl(site / "many.jsonl", many)


def curve(site: Path, case: str, strategy: str) -> list[dict]:
    """The rows of metrics.jsonl of one run, without what depends on the hour."""
    directory = site / "runs" / f"{case}-{strategy}".replace(" ", "_").replace(",", "")
    words = [*COMMON.split(), *CASES[case].split(), f"strategy={strategy}", f"run.dir={directory}"]
    words.append(f"launcher.processes={1 if strategy == 'single' else 2}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.main", "train", *words]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{case}, {strategy}: ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in {*TIMES, VERSION}} for row in rows]


def curves(chosen: str) -> dict[str, list[dict]]:
    """Every run whose name contains `chosen`, two at a time."""
    with tempfile.TemporaryDirectory() as made:
        site = Path(made)
        write_site(site)
        pairs = [(case, strategy) for case in CASES for strategy in STRATEGIES if chosen in f"{case}, {strategy}"]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda pair: curve(site, *pair), pairs))
    return {f"{case}, {strategy}": rows for (case, strategy), rows in zip(pairs, found, strict=True)}


def differences(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> list[str]:
    """One line a number that is not the same, to the last digit."""
    lines = [f"{name}: only in one of the two" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if len(old) != len(new):
            lines.append(f"{name}: {len(old)} rows before, {len(new)} after")
        for one, other in zip(old, new, strict=False):
            step = one.get("step")
            keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
            lines += [f"{name}, step {step}: {key} {one.get(key)!r} before, {other.get(key)!r} after" for key in keys]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("files", nargs="+", type=Path, help="write: where to; compare: one file with now, or two files")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    asked = parser.parse_args()
    began = time.perf_counter()
    if asked.what == "write":
        found = curves(asked.only)
        asked.files[0].write_text(json.dumps(found, indent=1))
        print(f"{len(found)} runs, {sum(map(len, found.values()))} rows in {time.perf_counter() - began:.0f} s")
        return 0
    before = {k: v for k, v in json.loads(asked.files[0].read_text()).items() if asked.only in k}
    after = json.loads(asked.files[1].read_text()) if len(asked.files) > 1 else curves(asked.only)
    lines = differences(before, after)
    numbers = sum(len(row) for rows in before.values() for row in rows)
    print("\n".join(lines) or f"{len(before)} runs, {numbers} numbers: the same to the last digit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
