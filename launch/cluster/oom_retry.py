"""A run that ran out of memory is started again with less, where `launcher.retry` asks for it.

Amid its steps with half of `batch.micro`; while it chose its strategy without the one it tried.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from launch.config.frozen import freeze_choices, load_frozen
from strategies.base import AutoConfig
from trainer.config.run import AUTO, MICRO, STRATEGY, RunConfig, asked_micro
from trainer.reporting.status import read_failure


def lower_micro(run_dir: Path) -> str | None:
    """Freeze half of the micro-batch with twice the accumulation; what it was and is, None where there is nothing to halve.

    Where the run was choosing its strategy, freeze that the one which was tried ran out.

    The frozen configuration stays that of the run which was asked for, and notes what became of it. Errors: ConfigError,
    StorageError.
    """
    config = load_frozen(run_dir / "config.yaml")
    if isinstance(config.strategy, AutoConfig):
        return _without_tried(run_dir, config)
    micro = config.batch["micro"]
    if micro in (1, AUTO):
        return None
    step = read_failure(run_dir).get("step")
    lowered = _lowered(config, _half(micro), f"{micro} ran out of memory{f' at step {step}' if step else ''}")
    freeze_choices(run_dir, lowered)
    return f"{MICRO}: {micro} -> {lowered.batch['micro']}"


def _without_tried(run_dir: Path, config: RunConfig) -> str | None:
    tried = re.match(r"strategy=auto: with strategy=(\w+) ", read_failure(run_dir).get("message", ""))
    if tried is None:
        return None
    known = str(config.substitutions.get(STRATEGY, f"{AUTO} (")).removesuffix(")")
    note = f"{known}{'; ' if known[-1] != '(' else ''}{tried[1]} ran out of memory)"
    freeze_choices(run_dir, replace(config, substitutions={**config.substitutions, STRATEGY: note}))
    return f"without strategy={tried[1]}"


def _lowered(config: RunConfig, micro: int, why: str) -> RunConfig:
    """The run with `micro`, and in its note what was asked for and all that led here."""
    earlier = str(config.substitutions.get(MICRO, "")).partition("(")[2].removesuffix(")")
    note = f"{asked_micro(config.batch, config.substitutions)} -> {micro} ({'; '.join(filter(None, [earlier, why]))})"
    return replace(config, batch={**config.batch, "micro": micro}, substitutions={**config.substitutions, MICRO: note})


def _half(micro: int) -> int:
    """Its largest divisor up to its half: what divides it divides every rank's part of the global batch, too."""
    return max(size for size in range(1, micro // 2 + 1) if micro % size == 0)
