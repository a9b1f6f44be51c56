"""Isolates calls of lm-evaluation-harness: its warnings are collected, and its random numbers are its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trainer.evaluation.harness.compat import without_progress_bars

PYTHON_SEED = 0
"""The harness's seed of `random`."""
NUMPY_SEED = 1234
"""The harness's seed of numpy, and of few-shot examples."""


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Around calls of the harness: its warnings go into the yielded list, each once, and there are no progress bars.

    Changes the logger of lm_eval and the settings of `datasets`, and restores them at its end.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging as datasets_logging

    warnings: list[str] = []
    logger = logging.getLogger("lm_eval")
    handler = _WarningCollector(warnings)
    level_before = logger.level
    propagate_before = logger.propagate
    verbosity_before = datasets_logging.get_verbosity()
    bars_disabled_before = are_progress_bars_disabled()

    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False  # else the root logger prints them too
    datasets_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with without_progress_bars():
            yield warnings
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level_before)
        logger.propagate = propagate_before
        datasets_logging.set_verbosity(verbosity_before)
        if not bars_disabled_before:
            enable_progress_bars()


class _WarningCollector(logging.Handler):
    """Appends each warning to a list, once, in one line of at most 300 characters."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:300]
        if text not in self.warnings:
            self.warnings.append(text)


@contextmanager
def harness_seeds() -> Iterator[None]:
    """Around calls of the harness: random numbers are those of lm-eval's own command, and so are the results.

    Afterwards they continue where they were, so that training is not affected.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
