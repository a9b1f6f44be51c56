"""Resumable training state on disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written and how much of it is kept."""

    every_steps: int = 0
    """Steps between checkpoints; 0 writes one at the end and when the run is preempted."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    save_final: bool = True
    """Write a checkpoint after the last step, so that the run can be extended."""
