"""What a held-out metric means in a run: whether larger is better, and whether two runs measured it in the same way."""

from __future__ import annotations

from launch.compare.run_files import RecordedRun

DEFAULT_METRIC = "eval/loss"
REWARD = "eval/reward"
REWARDS = "objective.rewards."
"""Prefix of the settings of rewards."""
TRAINING_ONLY = "objective.forgetting."
"""Prefix of settings of the objective that change no held-out loss."""
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "calibration_error", "nll")
LARGER_IS_BETTER = (
    *("accuracy", "margin", "f1", "f1_macro", "f1_micro", "bleu", "chrf", "rouge1", "rouge2", "rougeL"),
    *("exact_match", "token_accuracy", "win_rate", "reward", "score"),
)
"""Names of metrics whose direction is known without asking the tasks that have them, which loads torch."""


def metric_direction(run: RecordedRun, name: str) -> bool | None:
    """Whether a larger value of the metric is better: as the run recorded it, else as its settings say, else by the name."""
    outcome = run.record.outcome
    if outcome is not None and outcome.watch == name and outcome.greater_is_better is not None:
        return outcome.greater_is_better
    configured = run.config.get("evaluation.greater_is_better")
    if configured is not None and run.config.get("evaluation.watch") == name:
        return bool(configured)
    return direction_by_name(name)


def direction_by_name(name: str) -> bool | None:
    """Whether a larger value of a metric is better, by its name alone; None if the name does not tell.

    `eval/loss`, `eval/loss_by_position/512` and `forgetting/loss` are False, `eval/qa/accuracy` is True.
    """
    parts = name.split("/")
    if "loss" in parts[1:2] or parts[0] == "forgetting":
        return False
    if parts[-1] in SMALLER_IS_BETTER:
        return False
    return True if parts[-1] in LARGER_IS_BETTER else None


def why_measured_differently(baseline: RecordedRun, run: RecordedRun, metric: str) -> str | None:
    """The settings because of which two runs measured a metric in different ways, so that its values cannot be compared.

    None if both runs were evaluated alike, as far as this metric needs it. Checked in this order, the first difference counts:

    - a task with documents of its own: the settings of this task, and nothing else
    - a loss: the settings of the objective, because each objective has a loss of its own
    - a reward: how answers are generated and scored
    - the held-out documents and how they are tokenised
    """
    parts = metric.split("/")
    keys = {*baseline.config, *run.config}
    task_prefix = f"evaluation.tasks.{parts[1]}." if len(parts) == 3 else None
    # A task without a file of its own asks the evaluation documents.
    if task_prefix is not None and baseline.config.get(f"{task_prefix}path") is not None:
        return differing_keys(baseline, run, {key for key in keys if key.startswith(task_prefix)})

    is_loss = direction_by_name(metric) is False or parts[-1] == "margin"
    if is_loss:
        objective_keys = {key for key in keys if key.startswith("objective.") and not key.startswith(TRAINING_ONLY)}
        objective = differing_keys(baseline, run, objective_keys)
        if objective is not None:
            return objective

    is_reward = metric == REWARD or metric.startswith("eval/pass_at_")
    if is_reward:
        scoring = differing_keys(baseline, run, _keys_of_scoring(baseline) | _keys_of_scoring(run))
        if scoring is not None:
            return scoring

    number_of_documents = differing_keys(baseline, run, {"evaluation.max_documents"})
    if number_of_documents is not None:
        return number_of_documents
    return _differing_held_out_data(baseline, run)


def _differing_held_out_data(baseline: RecordedRun, run: RecordedRun) -> str | None:
    """The settings because of which two runs have other held-out documents or tokens; None if they have the same."""
    fingerprints = {each.identity.get("data", {}).get("fingerprint") for each in (baseline, run)}
    is_recorded = None not in fingerprints
    if is_recorded and len(fingerprints) == 1:
        return None
    # A loss is a mean over tokens: another tokenizer makes another loss of the same documents.
    keys = {"data.eval_path", "data.eval_share", "model.tokenizer", "model.chat_template", "data.max_length"}
    if not is_recorded or not baseline.config.get("data.eval_path"):
        # The held-out documents may have been drawn from the training data, by the seed.
        keys |= {"data.path", "run.seed"}
    if baseline.config.get("model.tokenizer") is None:
        keys |= {"model.path"}  # the tokenizer is the model's
    return differing_keys(baseline, run, keys)


def _keys_of_scoring(run: RecordedRun) -> set[str]:
    """Keys of the settings that decide `eval/reward` of an answer: the rewards that count, and where an answer is cut off."""
    keys = {"objective.rollout.max_new_tokens", "objective.rollout.stop"}
    for key in run.config:
        if not key.startswith(REWARDS) or key.endswith(".timeout_s"):
            continue
        name = key.removeprefix(REWARDS).partition(".")[0]
        # A reward of weight 0 is only recorded, and changes no score.
        if run.config.get(f"{REWARDS}{name}.weight") != 0:
            keys.add(key)
    return keys


def differing_keys(baseline: RecordedRun, run: RecordedRun, keys: set[str]) -> str | None:
    """Those of the keys whose values differ between two runs, as in `data.path, run.seed`; None if none does."""
    names = [key for key in sorted(keys) if baseline.config.get(key) != run.config.get(key)]
    return ", ".join(names) or None
