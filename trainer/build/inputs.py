"""What a run has before its model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.base import Precision
from strategies.runtime import Runtime
from trainer.data.prepare import PreparedData


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What each start of a run prepares first, on every rank: from these and the configuration, all else is built."""

    tokenizer: Any
    """transformers' tokenizer of the model, with its chat template."""
    data: PreparedData
    precision: Precision
    """In which the model computes: `auto` is decided."""
    runtime: Runtime
    """This rank and its device."""
