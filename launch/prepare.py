"""`shardtune prepare`: data in, a prepared data set with its audit out; shows what would be learned, and stops.

Takes the same words as `train`; what concerns training alone (budget, batch) may be left out. `--shard i/n` makes one of
n parts, as a job of an array; the same words without it merge them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

USAGE = """usage: shardtune prepare [--shard i/n] [key=value ...]

  shardtune prepare model.path=models/smollm2 data.path=raw.jsonl
  shardtune prepare data=audited model.path=... data.path=...      look at everything, change nothing
  shardtune prepare data=hipaa model.path=... data.path=...        replace the identifiers of the Safe Harbor rule
  sbatch --array=0-7 --wrap 'shardtune prepare --shard $SLURM_ARRAY_TASK_ID/8 ...'    then once without --shard

Writes manifest.json, audit.json, audit.html, datacard.md and documents.arrow into the cache (data.cache_dir); rows that
cannot be used are listed in quarantine.jsonl, dropped documents in dropped.jsonl."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError, StorageError."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    words, shard = _shard(argv)
    from launch.recall import recall, remember

    known = recall(words) if shard is None else None
    if known is not None:
        return show(known["report"], Path(known["directory"]), cached=True)
    from launch.compose import compose
    from strategies.errors import ConfigError
    from trainer.config.validate import problems_of

    config = compose(words, check=False).config
    problems = [p for p in problems_of(config) if p.startswith(("data.", "model.", "objective"))]
    if problems:
        raise ConfigError(problems)
    from trainer.build import prepare_data, prepare_shard
    from trainer.model.loading import load_tokenizer
    from trainer.stopping.signals import StopRequest

    tokenizer = load_tokenizer(config.model)
    with StopRequest() as request:
        if shard is not None:
            prepare_shard(config, tokenizer, shard, stop=lambda: request.signal_name is not None)
            print(f"shard {shard[0]} of {shard[1]}: done; when all are, the same words without --shard merge them")
            return 0
        data = prepare_data(config, tokenizer, stop=lambda: request.signal_name is not None)
    remember(words, config, data.directory)
    return show(data.report, data.directory, cached=data.report["cached"])


def show(report: dict[str, Any], directory: Path, *, cached: bool) -> int:
    """Print what a person wants to know first; returns the exit code."""
    from trainer.data.report.preview import render, summary

    print(summary(report))
    if report["samples"]:
        sample = report["samples"][0]
        runs = [(piece["text"], piece["learned"]) for piece in sample["pieces"]]
        print(f"{sample['where']}:\n{render(runs, width=100)}")
    print(f"prepared: {directory}" + ("  (from the cache)" if cached else ""))
    print(f"look at:  {directory / 'audit.html'}", flush=True)
    return 0


def _shard(argv: list[str]) -> tuple[list[str], tuple[int, int] | None]:
    """The words without `--shard i/n` (or `--shard=i/n`), and its numbers. Raises ConfigError."""
    from trainer.data.cache import parse_shard

    words, shard = [], None
    rest = iter(argv)
    for word in rest:
        if word == "--shard" or word.startswith("--shard="):
            shard = parse_shard(word.partition("=")[2] or next(rest, ""))
        else:
            words.append(word)
    return words, shard
