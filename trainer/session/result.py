"""The result of a run whose training has ended: the weights that leave it, and what is measured of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from strategies.base import Engine
from strategies.errors import StorageError
from strategies.runtime import call_on_main
from trainer.build.inputs import RunInputs
from trainer.checkpoints.layout import STEP_DIR_FORMAT, checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.manifest import checkpoint_problem_on_all_ranks, manifest_sha256_at_step
from trainer.checkpoints.patience import waiting_for_disk
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepLoader
from trainer.evaluation.base import Evaluator
from trainer.export.exported_checkpoint import ChosenCheckpoint, choose_exported_checkpoint
from trainer.model.config import ModelConfig
from trainer.monitors.detectors import ChallengeDetectors
from trainer.objectives.registry import objective_family
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RunRecord
from trainer.rollout.loader import RolloutLoader
from trainer.session.closing import closing_sentence
from trainer.session.context import RunContext
from trainer.session.evaluators import build_test_evaluators
from trainer.session.looks_at_test_set import CheckpointWeights, measure_or_recall_test_result
from trainer.session.monitors import final_chat_answers
from trainer.session.run_facts import model_facts
from trainer.step import BuiltModel


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run whose training has ended, with the parts that its result is made of."""

    config: RunConfig
    inputs: RunInputs
    built: BuiltModel
    engine: Engine
    loader: StepLoader | RolloutLoader
    checkpoints: Checkpoints
    detectors: ChallengeDetectors
    outcome: TrainingOutcome
    context: RunContext
    local_model: ModelConfig
    """The model as this node reads it: that of `config`, or its copy on the node's disk (`launcher.stage`)."""

    @property
    def staged_model(self) -> ModelConfig | None:
        """The copy of the model on this node's disk; None if there is none."""
        return None if self.local_model is self.config.model else self.local_model


def choose_and_measure_checkpoint(run: TrainedRun, record: RunRecord) -> ModelFacts:
    """Choose the checkpoint to export, the last or the best, load it and evaluate it; returns facts for its model card.

    Afterwards the engine has the weights of that checkpoint. Sets in `run.outcome` what the last lines show (whether the run
    overfits, the answers, the test metrics), and in `record` the checkpoint and the test result. All ranks must call. Errors:
    StorageError, Preempted, those of rewards.
    """
    # Sum up the training.
    # A run that learns from rewards has rewards in place of losses: more is better.
    from_rewards = objective_family(run.config.objective).rollout is not None
    run.outcome.overfitting_sentence = closing_sentence(run.outcome, from_rewards=from_rewards)

    # Load the checkpoint, and let it answer the questions outside of the task.
    run.context.attempt.phase = "choosing the checkpoint to export"
    # `trained_tokens`: how many tokens the run had trained on when the checkpoint was saved.
    chosen, trained_tokens = load_checkpoint_to_export(run)
    record.exported_checkpoint = asdict(chosen)
    weights_changed = chosen.step != run.outcome.progress.step
    run.outcome.chat_answers = final_chat_answers(run.detectors, run.engine, refresh=weights_changed)

    # Evaluate it on the test documents.
    run.context.attempt.phase = "evaluating the test documents"
    run.context.attempt.require_run_dir_ownership(run.context.runtime)  # the result is written into the run directory
    record.test = measure_test_documents(run, chosen.step)
    run.outcome.test = {} if record.test is None else record.test["metrics"]
    return model_facts(run.config, record, run.outcome, chosen.step, trained_tokens, run.context.run_dir)


def load_checkpoint_to_export(run: TrainedRun) -> tuple[ChosenCheckpoint, int]:
    """Choose the checkpoint to export, and load it into the engine; returns (the checkpoint, the tokens it was trained on).

    Nothing is loaded if it is the last step, whose weights the engine has already; any other step has a checkpoint. All ranks
    must call. Raises StorageError on every rank if the best checkpoint cannot be read: with `export.checkpoint=last` it is not
    needed.
    """
    runtime = run.context.runtime
    print_line = run.context.console.print_line
    checkpoint_dir_by_step = dict(call_on_main(lambda: checkpoints_in(run.checkpoints.checkpoint_dirs), runtime))
    chosen = choose_exported_checkpoint(run.config.export.checkpoint, run.outcome, checkpoint_dir_by_step)
    if chosen.step == run.outcome.progress.step:
        return chosen, run.outcome.progress.tokens
    print_line(f"taking the weights of {chosen}")
    path = checkpoint_dir_by_step[chosen.step]
    with waiting_for_disk("reading the best checkpoint", size_bytes=0, runtime=runtime, print_line=print_line):
        problem = checkpoint_problem_on_all_ranks(path, runtime)  # an earlier start may have written it
        if problem is not None:
            raise StorageError(
                f"{path}: {problem}; it is the best checkpoint, and is to be exported: bring it back, or export the last one "
                "with export.checkpoint=last"
            )
        progress = run.engine.load(path)
    return chosen, progress.tokens


def measure_test_documents(run: TrainedRun, step: int) -> dict[str, Any] | None:
    """Evaluate the engine's weights, which are those after `step`, on the test documents; returns `test` of `run.json`.

    None without test documents. All ranks must call. Raises StorageError, Preempted, and the errors of rewards.
    """
    context = run.context
    weights = CheckpointWeights(
        run_dir=context.run_dir,
        step=step,
        checkpoint=STEP_DIR_FORMAT.format(step),
        manifest_sha256=manifest_sha256_at_step(context.run_dir, step, run.config.checkpoint.fallback_dir),
    )

    def make_evaluators() -> list[Evaluator]:  # not called if an earlier start has measured the same weights
        scorer = run.loader.round_builder.scorer if isinstance(run.loader, RolloutLoader) else None
        tokenizer = run.inputs.tokenizer
        return build_test_evaluators(
            run.config,
            run.inputs.data,
            run.built,
            tokenizer,
            run.engine,
            context.runtime,
            scorer,
            context.stop_agreement.new_stop_check,
        )

    return measure_or_recall_test_result(run.inputs.data, weights, context.runtime, make_evaluators, run.engine)
