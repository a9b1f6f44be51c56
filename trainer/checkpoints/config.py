"""The settings of training state on disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written and how much of it is kept."""

    every_steps: int = 0
    """Steps between checkpoints; 0 goes by time."""
    every_minutes: float | None = None
    """Minutes between checkpoints, with every_steps=0; null: 30 until a save was measured, then what its price and mtbf_h make
    best; 0 writes one at the end and when the run is stopped, and none between."""
    mtbf_h: float = 24.0
    """Hours from one failure of the whole job to the next, on average; the more nodes, the fewer."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    save_final: bool = True
    """Write a checkpoint after the last step, so that the run can be extended."""
    background: bool = True
    """Write checkpoints while training goes on, out of a copy in host memory (12 bytes a trained weight with AdamW, all ranks
    together); the last one, the one after a signal, and all where the copy has no room, in the step."""
    max_failures: int = 3
    """Checkpoints in a row that may fail to be written, each with a warning, before the run ends; the last one of a run must
    succeed."""
    fallback_dir: str | None = None
    """A directory on another disk that takes a checkpoint where the run's own cannot; a resumed run looks there, too."""
