"""Which library multiplies float32 matrices on CPUs, chosen at a run's first start and kept at every later one.

Two libraries round differently. A run that changed its library when it resumes would not be the run that was
interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from strategies.errors import StorageError
from strategies.matmul import Matmul, MatmulChoice
from strategies.runtime import Runtime, broadcast_object, first_rank_error, with_matmul
from trainer.config.run import AUTO, MATMUL_KEY, RunConfig, settled_matmul
from trainer.reporting.resolution import Resolution, resolution_of
from trainer.reporting.shared_choice import shared_choice


def resolve_matmul(
    config: RunConfig, run_dir: Path, runtime: Runtime, freeze: Callable[[Path, RunConfig], None]
) -> tuple[RunConfig, Runtime]:
    """Choose the library that multiplies float32 matrices on CPUs, if `run.matmul` is auto. All ranks must call.

    Returns the configuration with the choice among its substitutions, and the runtime that uses it. The first start chooses by
    the processor, or takes the choice of the comparison that the run belongs to, and writes the configuration with that note
    by `freeze`. Errors: StorageError on every rank.
    """
    if runtime.matmul is None or config.run.matmul is not Matmul.auto:
        return config, runtime
    # Rank 0 chooses, and an error of it is raised on all ranks.
    resolution: Resolution | None = None
    error = None
    if runtime.is_main:
        try:
            resolution = _resolution_of_run(config, run_dir, runtime.matmul, freeze)
        except StorageError as caught:
            error = caught
    failure = first_rank_error(error, runtime)
    if failure is not None:
        raise StorageError(failure.text)
    resolution = broadcast_object(resolution, runtime)
    config = replace(config, substitutions={**config.substitutions, MATMUL_KEY: resolution})
    return config, _with_library(settled_matmul(config), runtime)


def _resolution_of_run(
    config: RunConfig, run_dir: Path, choice: MatmulChoice, freeze: Callable[[Path, RunConfig], None]
) -> Resolution:
    """Which library this run uses, and why: that of its earlier start, else that of its comparison, else `choice`. On rank 0.

    A new choice is written into the frozen configuration.
    """
    earlier = config.resolution(MATMUL_KEY)
    if earlier is not None and settled_matmul(config) is not Matmul.auto:
        return earlier
    own_resolution = Resolution(MATMUL_KEY, AUTO, str(choice.library), choice.reason)
    shared = shared_choice(run_dir, MATMUL_KEY, asdict(own_resolution))
    resolution = resolution_of(MATMUL_KEY, shared) or own_resolution
    freeze(run_dir, replace(config, substitutions={**config.substitutions, MATMUL_KEY: resolution}))
    return resolution


def _with_library(library: Matmul, runtime: Runtime) -> Runtime:
    """The runtime with the library that the run began with.

    If this rank's host does not have that library, the runtime uses BLAS, with the reason in `runtime.matmul.reason`.
    """
    assert runtime.matmul is not None
    if library in (runtime.matmul.library, Matmul.auto):
        return runtime
    switched = with_matmul(library, runtime)
    assert switched.matmul is not None
    if switched.matmul.library is library:
        reason = "as this run began"
    else:
        reason = f"this run began with {library}; {switched.matmul.reason}"
    return replace(switched, matmul=MatmulChoice(switched.matmul.library, reason))
