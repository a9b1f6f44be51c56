"""Restarts a run that ran out of memory with smaller settings, if `launcher.retry` asks for it.

If it ran out during training, `batch.micro` is halved. If it ran out while `strategy=auto` tried a strategy, that
strategy is passed over.
"""

from dataclasses import replace
from pathlib import Path

from launch.config.frozen import load_frozen_config, rewrite_config_with_own_choices
from strategies.base import AutoConfig
from trainer.config.run import AUTO, MICRO_BATCH_KEY, STRATEGY_KEY, RunConfig, requested_micro_batch
from trainer.reporting.resolution import OutOfMemoryTrial, ResolvedSetting
from trainer.reporting.status import read_failure


def write_smaller_settings(run_dir: Path) -> str | None:
    """Make a run that ran out of memory smaller, so that its next start has a chance; returns the change as text, None if none.

    - While `strategy=auto` tried a strategy: that strategy is recorded as too large ("without strategy=ddp").
    - During training: the micro-batch is halved, with twice the gradient accumulation ("batch.micro: 8 -> 4").
    - With a micro-batch of 1, or one that is not chosen yet (`auto`): no change.

    Rewrites the run's `config.yaml`, which keeps the requested value beside the one in use, so that it stays the same run. Raises
    ConfigError if it cannot be read, StorageError if it cannot be written.
    """
    config = load_frozen_config(run_dir / "config.yaml")
    if isinstance(config.strategy, AutoConfig):
        return _exclude_tried_strategy(run_dir, config)
    micro_batch = config.batch["micro"]
    if micro_batch in (1, AUTO):
        return None
    failed_trial = OutOfMemoryTrial(choice=micro_batch, step=read_failure(run_dir).get("step"))
    smaller_config = _with_smaller_micro_batch(config, _halved_micro_batch(micro_batch), failed_trial)
    rewrite_config_with_own_choices(run_dir, smaller_config)
    return f"{MICRO_BATCH_KEY}: {micro_batch} -> {smaller_config.batch['micro']}"


def _exclude_tried_strategy(run_dir: Path, config: RunConfig) -> str | None:
    """Note in the run's `config.yaml` that the strategy on trial ran out of memory: `strategy=auto` does not try it again.

    Returns the change as text ("without strategy=ddp"); None, and nothing is written, if the recorded failure names no strategy.
    """
    settings_on_trial = read_failure(run_dir).get("ran_out_with")
    strategy = settings_on_trial.get(STRATEGY_KEY) if isinstance(settings_on_trial, dict) else None
    if strategy is None:
        return None
    # `substitutions` has, by key, how each setting got its value (its resolution): asked, chosen, and tried without success.
    earlier_resolution = config.resolution(STRATEGY_KEY) or ResolvedSetting(STRATEGY_KEY, asked=AUTO)
    trials = (*earlier_resolution.tried, OutOfMemoryTrial(strategy))
    substitutions = {**config.substitutions, STRATEGY_KEY: replace(earlier_resolution, tried=trials)}
    rewrite_config_with_own_choices(run_dir, replace(config, substitutions=substitutions))
    return f"without strategy={strategy}"


def _with_smaller_micro_batch(config: RunConfig, micro_batch: int, failed_trial: OutOfMemoryTrial) -> RunConfig:
    """A copy of the configuration with a smaller `batch.micro`, and a record of how it got that value.

    The record, among `substitutions`, has the value that the user asked for, the one that is chosen now, and each that ran out of
    memory, the last of which is `failed_trial`. By it, a resumed run is still recognised as the run that the user asked for.
    """
    earlier_resolution = config.resolution(MICRO_BATCH_KEY)
    if earlier_resolution is None:
        earlier_resolution = ResolvedSetting(MICRO_BATCH_KEY, asked=config.batch["micro"])
    resolution = replace(
        earlier_resolution,
        asked=requested_micro_batch(config.batch, config.substitutions),
        chosen=micro_batch,
        tried=(*earlier_resolution.tried, failed_trial),
    )
    substitutions = {**config.substitutions, MICRO_BATCH_KEY: resolution}
    return replace(config, batch={**config.batch, "micro": micro_batch}, substitutions=substitutions)


def _halved_micro_batch(micro: int) -> int:
    """The largest divisor of a micro-batch that is at most its half: 8 -> 4, 9 -> 3, 7 -> 1."""
    # A divisor of the micro-batch also divides each rank's share of the global batch.
    return max(size for size in range(1, micro // 2 + 1) if micro % size == 0)
