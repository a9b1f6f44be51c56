"""Writes the export of a run that has ended, out of its last checkpoint: each rank its own files of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from strategies.atomic_io import NOT_YET_VISIBLE_ERRNOS, call_until_visible
from strategies.runtime import call_on_main, gather_objects
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.manifest import MANIFEST_FILE, checkpoint_problem_on_all_ranks
from trainer.config.launching import run_writes_export, separate_job_writes_export
from trainer.config.run import RunConfig
from trainer.export.files import ExportInUse
from trainer.export.gates.judge import judge_at_end
from trainer.export.verify import compute_probe_reference
from trainer.export.write import write_export
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.run_record import RunRecord
from trainer.session.base_files import BASE_KIND, base_difference_lines, file_digests_among, pin_model_to_commit
from trainer.session.context import RunContext
from trainer.session.exported_model import describe_trained_model
from trainer.session.result import TrainedRun


class ExportOutcome(NamedTuple):
    """What became of an export: a directory, or a reason why there is none. Refused by gates, it has neither."""

    directory: Path | None = None
    changed_base_lines: Sequence[str] = ()
    """A line for each file of the base that has changed since the run started, if that is the reason."""
    problem: str | None = None
    """Any other reason, such as a checkpoint that cannot be read."""


def export_at_end(run: TrainedRun, model_facts: ModelFacts, record: RunRecord) -> Path | None:
    """Export the checkpoint of `model_facts.step` into `export/` when a run has ended; returns that directory.

    None if the configuration does not ask for an export, or if gates (limits on metrics), a changed base or an unreadable
    checkpoint forbid it. Else the engine is closed. All ranks must call; each writes its share of the model's files.

    `model_facts`: what the model card says of the model.
    `record`: becomes `run.json`; it gets the result of the gates, and the reason if nothing is exported.

    Errors: those of writing.
    """
    run.outcome.export_follows = separate_job_writes_export(run.config)
    # Empty says that the run got here: None, as the record begins, says that it did not.
    record.gates = {}
    record.not_exported = []
    if not run_writes_export(run.config):
        return None
    export_outcome = _export_if_allowed(run, model_facts)
    # A checkpoint that was saved for the export alone is only needed if the user has to export it later.
    if run.outcome.saved_for_export and export_outcome.directory is not None:
        run.checkpoints.discard_checkpoint_of_step(run.outcome.progress.step)
    record.gates = model_facts.gates
    record.not_exported = [*export_outcome.changed_base_lines]
    record.export_problem = export_outcome.problem
    return export_outcome.directory


def _export_if_allowed(run: TrainedRun, model_facts: ModelFacts) -> ExportOutcome:
    """Export the checkpoint of `model_facts.step`, unless gates, a changed base or the checkpoint forbid it: then print why.

    Sets `model_facts.gates`, which the export's documents show. All ranks must call.
    """
    config = run.config
    inputs = run.inputs
    context = run.context
    # The gates: limits on metrics that the configuration sets.
    gate_results = judge_at_end(
        config.gates,
        config.evaluation.tasks,
        run_dir=context.run_dir,
        step=model_facts.step,
        fallback_dir=config.checkpoint.fallback_dir,
        runtime=context.runtime,
    )
    model_facts.gates = gate_results.as_json()
    if gate_results.failed_gate_lines:
        context.console.print_line(gate_results.failed_gates_text(context.run_dir))
        # The user may override failed gates in the settings; the documents say so.
        if gate_results.override is None:
            return ExportOutcome()

    # The base and the checkpoint.
    # A hub id may point to another commit by now: take the one that the run began with.
    config = replace(config, model=pin_model_to_commit(config.model, model_facts.run.base_commit))
    changed_base_lines = _compare_base_and_print_changes(config, model_facts.run.identity, context)
    if changed_base_lines:
        return ExportOutcome(changed_base_lines=changed_base_lines)
    checkpoint_dirs = checkpoint_dirs_of(context.run_dir, config.checkpoint.fallback_dir)
    checkpoint, problem = _find_readable_checkpoint(checkpoint_dirs, model_facts.step, context)
    if checkpoint is None:
        context.console.print_line(f"not exported: {problem}")
        return ExportOutcome(problem=problem)

    # The export. To verify it, its outputs on some tokens are compared with those of the engine, which are computed first. Then
    # engine and state buffer are closed, since the export needs their memory.
    reference = None
    if config.export.verify:
        reference = compute_probe_reference(run.engine, run.built, inputs.tokenizer, context.runtime)
    run.engine.close()
    run.checkpoints.state_buffer.release()
    model = describe_trained_model(
        config,
        inputs.tokenizer,
        inputs.data,
        [checkpoint],
        inputs.precision,
        on_gpu=context.runtime.device.type == "cuda",
        total_steps=model_facts.run.total_steps,
        staged_model=run.staged_model,
    )
    try:
        export_dir = write_export(
            model,
            destination=context.run_dir / "export",
            config=config.export,
            facts=model_facts,
            runtime=context.runtime,
            reference=reference,
        )
        return ExportOutcome(directory=export_dir)
    except ExportInUse as error:
        # Somebody runs `shardtune export` on this run: no reason to fail the run, which is done.
        context.console.print_line(f"not exported: {error}")
        return ExportOutcome(problem=str(error))


def _compare_base_and_print_changes(
    config: RunConfig, identity: dict[str, Any] | None, context: RunContext
) -> list[str]:
    """Compare the base model's files with those that the run started with; prints and returns a line for each changed one.

    An export copies the base or merges into it: with another base it would be a model that nobody trained. The run itself is
    done, so a changed base neither fails the run nor starts it again. All ranks must call.

    `identity`: what the run was compared by when it started, with the digests of the base's files.
    """

    def compare() -> list[str]:
        recorded_digests = file_digests_among((identity or {})[BASE_KIND])
        # An export has the trained weights alone: neither the teacher nor the model before training.
        return base_difference_lines(config, recorded_digests, with_teacher=False, needs_initial_model=False)

    changed_lines = call_on_main(compare, context.runtime)
    if changed_lines:
        message = (
            "not exported: the base has changed since this run started; its checkpoints are whole. Bring these files back and "
            f"run `shardtune export {context.run_dir}`, or add accept=[{BASE_KIND}] to export with the base that lies there then"
        )
        context.console.print_line("\n    ".join([message, *changed_lines]))
    return changed_lines


def _find_readable_checkpoint(checkpoint_dirs: list[Path], step: int, context: RunContext) -> tuple[Path | None, str]:
    """Find the checkpoint of a step that every rank can read whole: (the checkpoint, ""), or (None, why there is none).

    All ranks must call. The reasons: there is none; some ranks cannot see it, on the disk of another host; its files do not match
    their checksums, of which each rank compares a share. Errors: StorageError if the directory of checkpoints cannot be listed.
    """

    def find_on_rank_0() -> Path | None:
        return dict(checkpoints_in(checkpoint_dirs)).get(step)

    checkpoint = call_on_main(find_on_rank_0, context.runtime)
    command = f"shardtune export {context.run_dir}"
    if checkpoint is None:
        return None, (
            f"there is no checkpoint of step {step}, and the export is read out of one. Free space for it, then start "
            f"the same command again; or export an earlier step: {command}"
        )
    visible_by_rank = gather_objects(_is_visible(checkpoint), context.runtime)
    blind_ranks = [rank for rank, is_visible in enumerate(visible_by_rank) if not is_visible]
    if blind_ranks:
        return None, (
            f"{checkpoint} cannot be seen from {len(blind_ranks)} of the ranks (the first is {blind_ranks[0]}), and each rank "
            f"reads its part of it. Run `{command}` on the host of rank 0, or give a checkpoint.fallback_dir that all hosts share"
        )
    damage = checkpoint_problem_on_all_ranks(checkpoint, context.runtime)
    if damage is not None:
        return None, f"{checkpoint} {damage}; export an earlier step: {command} checkpoint=<step>"
    return checkpoint, ""


def _is_visible(checkpoint: Path) -> bool:
    """Whether this process can see a checkpoint. Waits as long as a network file system may hide what another host has made."""
    try:
        call_until_visible((checkpoint / MANIFEST_FILE).stat, NOT_YET_VISIBLE_ERRNOS)
    except OSError:
        return False
    return True
