"""Isolates calls of lm-evaluation-harness: its warnings are collected, and its random numbers are its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trainer.evaluation.harness.compat import without_bars

SEED, OTHER_SEED = 0, 1234
"""What the harness seeds `random`, and numpy and few-shot examples, with."""


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """What the harness warns of goes into the list, each once, instead of to the screen; it draws no bars."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging as datasets_logging

    said: list[str] = []
    logger, handler = logging.getLogger("lm_eval"), _WarningCollector(said)
    before = logger.level, logger.propagate, datasets_logging.get_verbosity(), are_progress_bars_disabled()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    datasets_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with without_bars():
            yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        datasets_logging.set_verbosity(before[2])
        if not before[3]:
            enable_progress_bars()


class _WarningCollector(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:300]
        if text not in self.said:
            self.said.append(text)


@contextmanager
def harness_seeds() -> Iterator[None]:
    """Python's and numpy's generators as the harness seeds them, and afterwards as they were."""
    before, arrays = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(arrays)
