"""The made-up language, the model that knows it, and how it is trained and evaluated."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

WORDS = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
FOLLOWERS, LENGTH = 4, 16
GROUPS = ("north", "south")
KNOWN, OTHER = 0, 1
"""The language that the model knows, and one that it does not."""


def followers(language: int) -> dict[str, list[str]]:
    """The four words of a language that may follow each word."""
    rules = random.Random(f"language {language}")
    return {word: rules.sample(WORDS, FOLLOWERS) for word in WORDS}


def sentences(language: int, seed: object, count: int) -> list[str]:
    """Sentences of a language, in which each word has four that may follow it."""
    follow = followers(language)
    drawn, found = random.Random(f"{language} {seed}"), []
    for _ in range(count):
        words = [drawn.choice(WORDS)]
        while len(words) < LENGTH:
            words.append(drawn.choice(follow[words[-1]]))
        found.append(" ".join(words))
    return found


def write(path: Path, rows: list[dict[str, Any]] | list[str]) -> Path:
    """Rows, or texts, as JSON lines."""
    said = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    return path


def base_of(directory: Path) -> Path:
    """The model that knows the language; trained unless the directory has it."""
    if not (directory / "base" / "export").exists():
        data = write(directory / "known.jsonl", sentences(KNOWN, "base", 12_000))
        words = [f"model.path={_untrained(directory)}", f"data.path={data}", "optim.lr=5e-3", "schedule=cosine"]
        words += ["batch.global=16", "batch.micro=16", "budget.epochs=1", "export.at_end=true", "export.dtype=float32"]
        train(directory / "base", words)
    return directory / "base" / "export"


def _untrained(directory: Path) -> Path:
    """A directory with a random model and a tokenizer of whole words and single digits."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<end>", "<unknown>", "code", *GROUPS, *"0123456789", *WORDS]
    made = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unknown>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(directory / "untrained")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "untrained")
    return directory / "untrained"


def train(run: Path, words: list[str]) -> dict[str, Any]:
    """What a run wrote into `run.json`, with the rows of its evaluations; its screen goes into a file."""
    own = {
        "run.dir": run,
        "logging.report": "false",
        "run.device": "cpu",
        "run.threads": 1,
        "run.matmul": "blas",
        "logging.wandb": "disabled",
    }
    own |= {"objective": "pretrain", "data.max_length": 64, "batch.global": 8, "batch.micro": 8, "schedule": "constant"}
    own |= {"data.cache_dir": run.parent / "cache", "checkpoint.save_final": "false", "export.at_end": "false"}
    own |= {"launcher.processes": 1, "strategy": "single", "logging.report": "false"}
    given = dict(word.split("=", 1) for word in words)
    _command(run, "train", [f"{key}={value}" for key, value in {**own, **given}.items()])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return record | {"evaluations": [row for row in rows if "eval/loss" in row]}


def evaluate(run: Path, words: list[str]) -> dict[str, Any]:
    """What `shardtune evaluate` wrote of a run."""
    _command(run, "evaluate", [str(run), "run.device=cpu", "launcher.processes=1", *words])
    report: dict[str, Any] = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return report


def _command(run: Path, verb: str, words: list[str]) -> None:
    from launch.main import main

    run.mkdir(parents=True, exist_ok=True)
    screen = run / f"{verb}.txt"
    with screen.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([verb, *words])
    if code:
        raise SystemExit(f"{run}: {verb} failed with {code}, see {screen}")
