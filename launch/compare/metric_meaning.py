"""What a held-out metric means in a run: whether larger is better, and whether two runs measured it in the same way."""

from __future__ import annotations

from launch.compare.run_files import RecordedRun

HELD_OUT_LOSS = "eval/loss"
HELD_OUT_REWARD = "eval/reward"
REWARD_KEY_PREFIX = "objective.rewards."
"""Prefix of the settings of rewards: `objective.rewards.<reward>.<setting>`."""
TRAINING_ONLY_KEY_PREFIX = "objective.forgetting."
"""Prefix of settings of the objective that change no held-out loss."""
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "calibration_error", "nll")
LARGER_IS_BETTER = (
    *("accuracy", "margin", "f1", "f1_macro", "f1_micro", "bleu", "chrf", "rouge1", "rouge2", "rougeL"),
    *("exact_match", "token_accuracy", "win_rate", "reward", "score"),
)
"""Names of metrics whose direction is known without asking the tasks that have them, which loads torch."""


def monitored_metric(run: RecordedRun) -> str:
    """The held-out metric that decides which checkpoint of a run is the best. The first of these that there is:

    - The metric that the run recorded.
    - The setting `evaluation.watch`.
    - The reward, if it was evaluated.
    - The held-out loss.
    """
    outcome = run.record.outcome
    recorded_metric = outcome.watch if outcome is not None else None
    configured_metric = run.config.get("evaluation.watch")
    if recorded_metric or configured_metric:
        return str(recorded_metric or configured_metric)
    has_reward = any(HELD_OUT_REWARD in metrics for metrics in run.evaluations.values())
    return HELD_OUT_REWARD if has_reward else HELD_OUT_LOSS


def greater_is_better_in_run(run: RecordedRun, metric: str) -> bool | None:
    """Whether a larger value of a held-out metric is better in this run; None if nothing says it.

    The first of these that says it:

    - What the run recorded, which it does for its monitored metric.
    - The setting `evaluation.greater_is_better`, which is about the metric `evaluation.watch`.
    - The metric's name.
    """
    outcome = run.record.outcome
    if outcome is not None and outcome.watch == metric and outcome.greater_is_better is not None:
        return outcome.greater_is_better
    configured = run.config.get("evaluation.greater_is_better")
    if configured is not None and run.config.get("evaluation.watch") == metric:
        return bool(configured)
    return greater_is_better_by_name(metric)


def greater_is_better_by_name(metric: str) -> bool | None:
    """Whether a larger value of a metric is better, as far as its name tells; None if it does not.

    `eval/loss`, `eval/loss_by_position/512` and `forgetting/loss` are False, `eval/qa/accuracy` is True.
    """
    parts = metric.split("/")
    if parts[0] == "forgetting" or (len(parts) > 1 and parts[1] in ("loss", "loss_by_position")):
        return False
    if parts[-1] in SMALLER_IS_BETTER:
        return False
    return True if parts[-1] in LARGER_IS_BETTER else None


def keys_measured_differently(baseline: RecordedRun, run: RecordedRun, metric: str) -> list[str]:
    """Find out whether two runs measured a held-out metric alike: returns the keys of the settings because of which they did not.

    Empty if the metric can be compared. It is named `eval/<metric>`, or `eval/<task>/<metric>` for an evaluation task.
    These settings of the two runs must be equal:

    - for a task with documents of its own (`evaluation.tasks.<task>.path`): the settings of this task, and nothing else;
    - for any other metric: the settings of the objective if it is a loss, those of scoring if it is a reward, and then
      those of the held-out documents and their tokens. The first of these groups with a difference is returned.
    """
    task_key_prefix = _task_key_prefix(metric)
    if task_key_prefix is not None and baseline.config.get(f"{task_key_prefix}path") is not None:
        return differing_keys(baseline, run, _keys_below(task_key_prefix, baseline, run))

    if _is_computed_by_objective(metric):
        objective_keys = _keys_below("objective.", baseline, run)
        # These say what is done against forgetting in training, and change no held-out loss.
        objective_keys -= _keys_below(TRAINING_ONLY_KEY_PREFIX, baseline, run)
        if differing_objective_keys := differing_keys(baseline, run, objective_keys):
            return differing_objective_keys

    is_reward = metric == HELD_OUT_REWARD or metric.startswith("eval/pass_at_")
    scoring_keys = _scoring_keys(baseline) | _scoring_keys(run) if is_reward else set()
    if differing_scoring_keys := differing_keys(baseline, run, scoring_keys):
        return differing_scoring_keys

    # It limits how many of the held-out documents are evaluated, so it changes any metric of theirs.
    if differing_keys(baseline, run, {"evaluation.max_documents"}):
        return ["evaluation.max_documents"]
    return _differing_held_out_data_keys(baseline, run)


def _task_key_prefix(metric: str) -> str | None:
    """The prefix of the settings of the task that has a metric: `eval/qa/accuracy` -> `evaluation.tasks.qa.`.

    None if the name does not have the form `eval/<task>/<metric>`.
    """
    parts = metric.split("/")
    return f"evaluation.tasks.{parts[1]}." if len(parts) == 3 else None


def _is_computed_by_objective(metric: str) -> bool:
    """Whether the objective's loss function computes the metric: then runs with different objectives measure different things.

    A margin is one too: preference objectives compute it beside their loss, as the difference of two answers' scores.
    """
    is_loss = greater_is_better_by_name(metric) is False
    return is_loss or metric.split("/")[-1] == "margin"


def _keys_below(prefix: str, *runs: RecordedRun) -> set[str]:
    """The keys that begin with this prefix, such as `objective.`, among the settings of any of the runs."""
    keys: set[str] = set()
    for run in runs:
        keys |= {key for key in run.config if key.startswith(prefix)}
    return keys


def _differing_held_out_data_keys(baseline: RecordedRun, run: RecordedRun) -> list[str]:
    """Keys of the settings because of which two runs may have evaluated different documents, or the same with other tokens.

    Empty if the fingerprints of their prepared data are equal, or if none of these settings differs.
    """
    fingerprints = {recorded.identity.get("data", {}).get("fingerprint") for recorded in (baseline, run)}
    have_fingerprints = None not in fingerprints
    if have_fingerprints and len(fingerprints) == 1:
        return []
    # A loss is a mean over tokens: another tokenizer makes another loss of the same documents.
    keys = {"data.eval_path", "data.eval_share", "model.tokenizer", "model.chat_template", "data.max_length"}
    if not have_fingerprints or not baseline.config.get("data.eval_path"):
        # The held-out documents may have been drawn from the training data, by the seed.
        keys |= {"data.path", "run.seed"}
    if baseline.config.get("model.tokenizer") is None:
        keys |= {"model.path"}  # the tokenizer is the model's
    return differing_keys(baseline, run, keys)


def _scoring_keys(run: RecordedRun) -> set[str]:
    """Keys of the settings that decide the reward of an answer: the rewards that count, and where an answer is cut off."""
    keys = {"objective.rollout.max_new_tokens", "objective.rollout.stop"}
    for key in run.config:
        # A time-out ends a reward that hangs; it scores no answer.
        if not key.startswith(REWARD_KEY_PREFIX) or key.endswith(".timeout_s"):
            continue
        reward_name = key.removeprefix(REWARD_KEY_PREFIX).partition(".")[0]
        # A reward of weight 0 is only recorded, and changes no score.
        if run.config.get(f"{REWARD_KEY_PREFIX}{reward_name}.weight") != 0:
            keys.add(key)
    return keys


def differing_keys(baseline: RecordedRun, run: RecordedRun, keys: set[str]) -> list[str]:
    """Which of these settings have different values in the two runs: their keys, sorted. A missing setting counts as None."""
    return [key for key in sorted(keys) if baseline.config.get(key) != run.config.get(key)]
