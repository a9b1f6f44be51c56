"""Writes the export of a run that has ended, out of its last checkpoint: each rank its own files of a whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from strategies.atomic_io import NOT_YET_VISIBLE, retry_until_visible
from strategies.runtime import call_on_main, gather_objects
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.manifest import MANIFEST, verify_together
from trainer.config.launching import exports_at_end, leaves_export_to_job
from trainer.config.run import RunConfig
from trainer.export.files import ExportInUse
from trainer.export.gates.judge import judge_at_end
from trainer.export.verify import take_reference
from trainer.export.write import write_export
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.run_record import RunRecord
from trainer.session.announcements import RunContext
from trainer.session.base_files import BASE, at_commit, changed_files, files_among
from trainer.session.exported_model import describe_trained_model
from trainer.session.result import TrainedRun


def export_at_end(run: TrainedRun, of_model: ModelFacts, record: RunRecord) -> Path | None:
    """Write `export/` out of a checkpoint and return its directory; None if none is asked for, or if something forbids it.

    The weights are those that `of_model` is about. All ranks must call; each writes its share of a whole model's files. The
    engine is closed. Notes in `record` what the gates said, and why nothing was exported. Errors: those of writing.
    """
    run.outcome.export_follows = leaves_export_to_job(run.config)
    record.gates = {}
    record.not_exported = []
    if not exports_at_end(run.config):
        return None
    exported = _export(run, of_model)
    if run.outcome.saved_for_export and exported is not None:  # what is said of a later export needs the checkpoint
        run.checkpoints.discard(run.outcome.progress.step)
    record.gates = of_model.gates
    record.not_exported = of_model.run.not_exported or []
    record.export_problem = of_model.run.export_problem
    return exported


def _export(run: TrainedRun, of_model: ModelFacts) -> Path | None:
    """Export the weights that `of_model` is about; None if gates, a changed base or the checkpoint forbid it. All ranks call."""
    config = run.config
    inputs = run.inputs
    context = run.context
    judged = judge_at_end(
        config.gates,
        config.evaluation.tasks,
        run_dir=context.run_dir,
        step=of_model.step,
        fallback_dir=config.checkpoint.fallback_dir,
        runtime=context.runtime,
    )
    of_model.gates = judged.record()
    if judged.refused:
        context.console.print_line(judged.refusal_text(context.run_dir))
        if judged.override is None:
            return None
    config = replace(config, model=at_commit(config.model, of_model.run.base_commit))
    if changed := _changed_base(config, of_model, context):
        of_model.run.not_exported = changed
        return None
    checkpoint, problem = _sealed_checkpoint(config, of_model.step, context)
    if checkpoint is None:
        context.console.print_line(f"not exported: {problem}")
        of_model.run.export_problem = problem
        return None

    reference = None
    if config.export.verify:
        reference = take_reference(run.engine, run.built, inputs.tokenizer, context.runtime)
    # What follows needs their memory.
    run.engine.close()
    run.checkpoints.state_buffer.release()
    model = describe_trained_model(
        config,
        inputs.tokenizer,
        inputs.data,
        [checkpoint],
        inputs.precision,
        on_gpu=context.runtime.device.type == "cuda",
        total_steps=of_model.run.total_steps,
        staged_model=run.staged_model,
    )
    try:
        return write_export(
            model,
            destination=context.run_dir / "export",
            config=config.export,
            facts=of_model,
            runtime=context.runtime,
            reference=reference,
        )
    except ExportInUse as error:  # `shardtune export`, typed while the run still trained: the run itself is done
        context.console.print_line(f"not exported: {error}")
        of_model.run.export_problem = str(error)
        return None


def _changed_base(config: RunConfig, of_model: ModelFacts, context: RunContext) -> list[str]:
    """Files of the base that have changed since this run started, one line each; mostly empty. All ranks must call.

    An export copies the base or merges into it: with another base it would be a model that nobody trained. The run itself
    is done, so a changed base is only said on the screen: it neither fails the run nor starts it again.
    """

    def compare() -> list[str]:
        recorded = files_among((of_model.run.identity or {})[BASE])
        return changed_files(config, recorded, teacher=False, start=False)

    changed = call_on_main(compare, context.runtime)
    if changed:
        message = (
            "not exported: the base has changed since this run started; its checkpoints are whole. Bring these files back and "
            f"run `shardtune export {context.run_dir}`, or add accept=[{BASE}] to export with the base that lies there then"
        )
        context.console.print_line("\n    ".join([message, *changed]))
    return changed


def _sealed_checkpoint(config: RunConfig, step: int, context: RunContext) -> tuple[Path | None, str]:
    """(the checkpoint of a step that every rank can read, a problem in words). All ranks must call.

    The checkpoint is None if there is none, or if it cannot be exported; the problem is empty otherwise. Each rank compares its
    share of the files with their checksums. Errors: StorageError if the directory of checkpoints cannot be listed.
    """
    checkpoint_dirs = checkpoint_dirs_of(context.run_dir, config.checkpoint.fallback_dir)

    def find() -> Path | None:
        return dict(checkpoints_in(checkpoint_dirs)).get(step)

    checkpoint = call_on_main(find, context.runtime)
    command = f"shardtune export {context.run_dir}"
    if checkpoint is None:
        return None, (
            f"there is no checkpoint of step {step}, and the export is read out of one. Free space for it, then start "
            f"the same command again; or export an earlier step: {command}"
        )
    blind_ranks = [rank for rank, sees in enumerate(gather_objects(_sees(checkpoint), context.runtime)) if not sees]
    if blind_ranks:
        return None, (
            f"{checkpoint} cannot be seen from {len(blind_ranks)} of the ranks (the first is {blind_ranks[0]}), and each rank "
            f"reads its part of it. Run `{command}` on the host of rank 0, or give a checkpoint.fallback_dir that all hosts share"
        )
    damage = verify_together(checkpoint, context.runtime)
    if damage is not None:
        return None, f"{checkpoint} {damage}; export an earlier step: {command} checkpoint=<step>"
    return checkpoint, ""


def _sees(checkpoint: Path) -> bool:
    """Whether this process can see a checkpoint. Waits as long as a network file system may hide what another host has made."""
    try:
        retry_until_visible((checkpoint / MANIFEST).stat, NOT_YET_VISIBLE)
    except OSError:
        return False
    return True
