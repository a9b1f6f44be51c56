"""`shardtune prepare`: makes a prepared data set with its audit, shows what would be learned, and stops.

It takes the arguments of `train`. Settings of training alone (budget, batch) may be left out. `--shard i/n` prepares one
of n parts, as a job of an array; the same arguments without it merge the parts.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
)
from strategies.compat.python import end_process
from strategies.errors import ConfigError, Preempted, key_of_problem
from strategies.imports import importing_without_gc

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.data.config import PrivacyConfig
    from trainer.data.prepare import PreparedData


@dataclass(kw_only=True)
class PrepareArguments(VerbArguments):
    """What `shardtune prepare` takes."""

    shard: str | None = option(
        "prepare one of n parts, as a job of an array; afterwards, the same command without --shard merge the parts",
        key="--shard",
        example="0/8",
    )
    settings: list[str] = forwarded_settings(forwards_unknown_flags=True)
    as_json: bool = flag("print the numbers of the audit and the directory of the data as JSON", key="--json")


OTHER_FORMS = {"--print": "show documents and their masks; see prepare --print --help"}
USAGE = f"""usage: shardtune prepare [--shard i/n] [--json] [key=value ...]
       shardtune prepare --print <directory> | <settings of a run>

  shardtune prepare model.path=models/smollm2 data.path=raw.jsonl
  shardtune prepare data=audited model.path=... data.path=...      check everything, change nothing
  shardtune prepare data=hipaa model.path=... data.path=...        replace the identifiers of the Safe Harbor rule
  sbatch --array=0-7 --wrap 'shardtune prepare --shard $SLURM_ARRAY_TASK_ID/8 ...'    then once without --shard

prepare reads, checks, cleans and tokenises the data of a run. `train` uses the result if it is there, and prepares
the data itself if not. The cache (data.cache_dir) gets documents.arrow, manifest.json, audit.json, audit.html and
datacard.md. quarantine.jsonl lists the rows that cannot be used, and dropped.jsonl the documents that were dropped.

{help_rows(PrepareArguments, OTHER_FORMS)}"""


def main(argv: list[str]) -> int:
    """Run `shardtune prepare` with the arguments `argv`: prepare a run's data, a shard of it, or print it; returns the exit code.

    A shard is one of n parts, which jobs of an array prepare; a call without `--shard` merges them. Raises ConfigError for
    wrong settings, DataError for data that cannot be used, StorageError.
    """
    if "--print" in argv:  # has arguments of its own, which `read_arguments` would refuse
        from launch.prepare import print_documents

        other_arguments = [argument for argument in argv if argument != "--print"]
        return print_documents.main(other_arguments, lambda settings: prepare_data_of_run(settings).directory)
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments, problems = read_arguments("prepare", PrepareArguments, argv)
    if problems:
        raise ConfigError(problems)
    if arguments.shard is not None:
        from trainer.data.cache import parse_shard

        shard = parse_shard(arguments.shard)
        _prepare_data_or_shard(_compose_config_to_prepare(arguments.settings), shard=shard)
        shard_number, shard_count = shard
        print(f"shard {shard_number} of {shard_count}: done; when all are, the same command without --shard merge them")
        return 0
    config = _compose_config_to_prepare(arguments.settings)
    data = _prepare_data(config)
    was_in_cache = data.report["cached"]
    if arguments.as_json:
        answer = {"directory": str(data.directory), "cached": was_in_cache, "report": data.report}
        print(json.dumps(answer, ensure_ascii=False))
    else:
        from trainer.objectives.registry import data_spec_of

        num_sequences = data_spec_of(config.objective).sequences_per_document
        print_audit(data.report, data.directory, config.data.privacy, num_sequences, cached=was_in_cache)
    return 0


def prepare_data_of_run(settings: list[str]) -> PreparedData:
    """Prepare the data of a run with these settings, or take it from the cache. Its `report` is the audit of the data.

    Raises ConfigError for settings of the data, the model or the objective that cannot be used.
    """
    return _prepare_data(_compose_config_to_prepare(settings))


def _prepare_data(config: RunConfig) -> PreparedData:
    """Prepare the data of a run of this configuration, or take it from the cache. Its `report` is the audit of the data."""
    data = _prepare_data_or_shard(config, shard=None)
    assert data is not None  # None is returned for a shard alone
    return data


def _compose_config_to_prepare(settings: list[str]) -> RunConfig:
    """Compose the configuration of the run whose data is prepared, from its settings.

    Raises ConfigError for settings of the data, the model or the objective that cannot be used. Others may be wrong or
    missing: preparing needs no budget or batch.
    """
    # Without looking for garbage meanwhile, which would take a fifth of the time to start.
    with importing_without_gc("torch"):
        from launch.config.compose import compose_config
        from trainer.config.validate import config_problems

    config = compose_config(settings, check=False).config
    relevant_keys = ("data.", "model.", "objective")
    problems = [problem for problem in config_problems(config) if key_of_problem(problem).startswith(relevant_keys)]
    if problems:
        raise ConfigError(problems)
    return config


def _prepare_data_or_shard(config: RunConfig, *, shard: tuple[int, int] | None) -> PreparedData | None:
    """Prepare the data of a run of this configuration, or take it from the cache; with `shard`, only one part of it.

    `shard`: (index, number of shards), such as (0, 8). A later call without it merges the parts. None is returned for a
    part, which is written to the cache.
    """
    with importing_without_gc("trainer.build.parts"):
        from trainer.build.parts import prepare_data, prepare_shard
        from trainer.model.loading import load_tokenizer
        from trainer.stopping.signals import StopRequest

    with StopRequest() as request:
        # Preparing asks only now and then whether to stop; a library call that hangs never gets there.
        request.arm_end_of_stuck_process(_end_stuck_process)
        tokenizer = load_tokenizer(config.model)

        def is_stop_requested() -> bool:
            return request.signal_name is not None

        if shard is not None:
            prepare_shard(config, tokenizer, shard, stop=is_stop_requested)
            return None
        return prepare_data(config, tokenizer, stop=is_stop_requested)


def _end_stuck_process(signal_name: str) -> None:
    """End this process, which was asked to stop and is stuck, for example in a library call.

    Nothing is lost but time: half prepared data has no name in the cache.
    """
    with suppress(OSError):  # nobody reads stderr any more
        os.write(2, f"shardtune prepare: stopped ({signal_name}); run the same command to start again\n".encode())
    end_process(Preempted.exit_code)


def print_audit(
    report: dict[str, Any], directory: Path, privacy: PrivacyConfig, num_sequences: int, *, cached: bool
) -> None:
    """Show the user what `prepare` made: the summary of the audit, the first document with what is learned, the directory.

    `report`: the audit. `privacy`: how personal data was looked for; in the document it is masked. `num_sequences`: how many a
    document has, such as 2 of a pair of answers. `cached`: whether the data was prepared before.
    """
    from trainer.data.report.preview import summary_text

    print(summary_text(report))
    print("\n".join(_first_document_lines(report, privacy, num_sequences)))
    print(f"prepared: {directory}" + ("  (from the cache)" if cached else ""))
    print(f"look at:  {directory / 'audit.html'}", flush=True)


def _first_document_lines(report: dict[str, Any], privacy: PrivacyConfig, num_sequences: int) -> list[str]:
    """The first document of the audit's samples as lines for the terminal: where it is from, and what is learned of it.

    `report`: the audit; its "samples" are sequences in pieces, [{"where": "a.jsonl:1", "pieces": [{"text": "Hello", "learned":
    true}], ...}], `num_sequences` of each document. If personal data was found and left in the data, it is masked and a
    line says so; what only Presidio finds cannot be masked here, and the line stands alone.
    """
    from trainer.data.report import masked_samples
    from trainer.data.report.preview import render_pieces
    from trainer.data.report.wording import escape_control_characters

    # Not those with the same place: rows of a JSON list may all stand on one line.
    samples = report["samples"][:num_sequences]
    has_personal_data = masked_samples.has_reported_personal_data(report)
    if has_personal_data and not masked_samples.samples_can_be_masked(privacy):
        return [masked_samples.LEFT_OUT_NOTE]
    mask_pieces = masked_samples.piece_masker(privacy) if has_personal_data else list
    lines = []
    for sample in samples:
        pieces = mask_pieces([(piece["text"], piece["learned"]) for piece in sample["pieces"]])
        note = sample.get("note")  # data prepared by an earlier version has none
        note_text = f" · {escape_control_characters(note)}" if note else ""
        lines.append(f"{sample['where']}{note_text}:\n{render_pieces(pieces, width=100)}")
    if has_personal_data:
        lines.append(masked_samples.MASK_NOTE)
    return lines
