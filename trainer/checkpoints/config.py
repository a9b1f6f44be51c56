"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.settings import DESCRIBES, number, setting


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written and how much of it is kept."""

    every_steps: int = number(0, least=0, advice="0 goes by time (checkpoint.every_minutes)")
    """Optimizer steps between checkpoints. 0: `every_minutes` decides."""
    every_minutes: float | None = number(
        None, least=0, advice="null goes by what a save costs, 0 writes the last one only"
    )
    """Minutes between checkpoints, if `every_steps=0`. null: 30 until the first save has been timed, then the interval that
    loses the least work, given the time of a save and `mtbf_h`. 0: only at the end, and when the run is stopped."""
    mtbf_h: float = number(24.0, above=0, advice="24 as a rule; fewer for many nodes or a spot market")
    """Mean time between failures of the whole job, in hours. More nodes fail more often."""
    keep: int = number(2, least=1, advice="2 survives a checkpoint that was damaged")
    """Number of newest checkpoints that are kept. The best checkpoint is kept in addition."""
    save_final: bool = setting(True, reach=DESCRIBES)
    """Keep the checkpoint of the last step, so that the run can be extended. `false` deletes it after the export."""
    background: bool = setting(True, reach=DESCRIBES)
    """Write checkpoints while training continues, from a copy in host memory (12 bytes per trained parameter with AdamW, over
    all ranks). Training waits for the last checkpoint, for the one after a signal, and if host memory has no room for the
    copy."""
    max_failures: int = number(3, least=0, advice="0 ends the run at the first")
    """Number of consecutive checkpoints that may fail to be written. Each failure is a warning; one more ends the run. The last
    checkpoint of a run must succeed."""
    fallback_dir: str | None = setting(None, reach=DESCRIBES)
    """Directory on another disk, for checkpoints that cannot be written to the run's own disk. A resumed run also looks
    there."""
