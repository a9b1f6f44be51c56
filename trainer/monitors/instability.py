"""Reports at the end of a run what the guards (`anomalies.py`) saw of single steps."""

from __future__ import annotations

from strategies.base import Progress
from trainer.monitors.base import Finding

REMEDIES = (
    "a lower optim.lr",
    "schedule.warmup_share=0.1",
    "a larger batch.global",
    "optim.max_grad_norm=1",
    "precision=bf16 rather than fp16",
    "guards.grad_norm=skip, or rollback (events.jsonl names the documents)",
)
MIN_ODD_STEP_SHARE = 0.02
"""Share of steps that stand out, are left out or undone, from which a run is called unstable; one alone is an odd batch."""


def find_instability(progress: Progress) -> Finding | None:
    """Report at the end of training that a run was unstable; None if it was not.

    Unstable: it went back to an earlier checkpoint, or at least two of its steps and `MIN_ODD_STEP_SHARE` of them stood out by
    their loss or gradient norm, or had their update left out.
    """
    # A step may be both an outlier and skipped, so that their sum would count it twice.
    odd_steps = max(progress.outliers, progress.skipped_steps)
    is_rare = odd_steps < 2 or odd_steps < MIN_ODD_STEP_SHARE * progress.step
    if progress.rollbacks == 0 and is_rare:
        return None
    return Finding(
        detector="instability",
        step=progress.step,
        message=(
            f"{progress.outliers} steps stood out by their loss or gradient norm, {progress.skipped_steps} updates were left "
            f"out, and the run went back {progress.rollbacks} times, in {progress.step} steps (guards.threshold: medians)"
        ),
        numbers={
            "outliers": float(progress.outliers),
            "skipped_steps": float(progress.skipped_steps),
            "rollbacks": float(progress.rollbacks),
        },
        remedies=REMEDIES,
    )
