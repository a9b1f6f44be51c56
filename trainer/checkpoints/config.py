"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.settings import DESCRIBES, number, setting


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written and how much of it is kept."""

    every_steps: int = number(0, least=0, advice="0 goes by time (checkpoint.every_minutes)")
    """Steps between checkpoints; 0 goes by time."""
    every_minutes: float | None = number(
        None, least=0, advice="null goes by what a save costs, 0 writes the last one only"
    )
    """Minutes between checkpoints, with every_steps=0; null: 30 until a save was measured, then what its price and mtbf_h make
    best; 0 writes one at the end and when the run is stopped, and none between."""
    mtbf_h: float = number(24.0, above=0, advice="24 as a rule; fewer for many nodes or a spot market")
    """Hours from one failure of the whole job to the next, on average; the more nodes, the fewer."""
    keep: int = number(2, least=1, advice="2 survives a checkpoint that was damaged")
    """Newest checkpoints kept; the best one is kept besides."""
    save_final: bool = setting(True, reach=DESCRIBES)
    """Keep a checkpoint of the last step, so that the run can be extended; `false` deletes it after the export."""
    background: bool = setting(True, reach=DESCRIBES)
    """Write checkpoints while training continues, out of a copy in host memory (12 bytes a trained weight with AdamW, all ranks
    together); the last one, the one after a signal, and all where the copy has no room, in the step."""
    max_failures: int = number(3, least=0, advice="0 ends the run at the first")
    """Checkpoints in a row that may fail to be written, each with a warning, before the run ends; the last one of a run must
    succeed."""
    fallback_dir: str | None = setting(None, reach=DESCRIBES)
    """A directory on another disk that takes a checkpoint where the run's own cannot; a resumed run looks there, too."""
