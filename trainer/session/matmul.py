"""Which library multiplies float32 matrices on CPUs, chosen at a run's first start and kept at every later one.

Two libraries round differently. A run that changed its library when it resumes would not be the run that was
interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from strategies.matmul import Matmul, MatmulChoice
from strategies.runtime import Runtime, call_on_main, with_matmul
from trainer.config.run import AUTO, MATMUL_KEY, RunConfig, settled_matmul
from trainer.reporting.resolution import ResolvedSetting, parse_resolution
from trainer.reporting.shared_choice import agree_on_shared_choice


def resolve_matmul(
    config: RunConfig, run_dir: Path, runtime: Runtime, write_config: Callable[[Path, RunConfig], None]
) -> tuple[RunConfig, Runtime]:
    """Resolve `run.matmul=auto`: choose the library that multiplies float32 matrices on CPUs. All ranks must call.

    Libraries round differently, so all ranks and all starts of a run use one. Returns the configuration with the choice and its
    reason among its substitutions, and the runtime that uses the library. On GPUs, and if the user named a library, both are
    returned as they are. Raises StorageError on every rank if the choice cannot be written.
    """
    choice_for_this_host = runtime.matmul  # by its processor; None on GPUs
    if choice_for_this_host is None or config.run.matmul is not Matmul.auto:
        return config, runtime

    def choose_on_rank_0() -> ResolvedSetting:
        return _choose_matmul_library(config, run_dir, choice_for_this_host, write_config)

    resolution = call_on_main(choose_on_rank_0, runtime)
    config = _with_matmul_resolution(config, resolution)
    return config, _runtime_with_library(settled_matmul(config), runtime)


def _choose_matmul_library(
    config: RunConfig,
    run_dir: Path,
    choice_for_this_host: MatmulChoice,
    write_config: Callable[[Path, RunConfig], None],
) -> ResolvedSetting:
    """Choose which library multiplies float32 matrices in this run, and say why. Called on rank 0 alone.

    - The library of an earlier start of this run, which is in the configuration already.
    - Else that of the comparison to which the run belongs, which its first run decides.
    - Else `choice_for_this_host`, by its processor.

    In the last two cases it also calls `write_config(run_dir, config)` with the choice in the configuration, which writes
    `config.yaml`. Raises StorageError.
    """
    earlier = config.resolution(MATMUL_KEY)
    if earlier is not None and settled_matmul(config) is not Matmul.auto:
        return earlier
    resolution_for_this_host = ResolvedSetting(
        MATMUL_KEY, asked=AUTO, chosen=str(choice_for_this_host.library), reason=choice_for_this_host.reason
    )
    shared = agree_on_shared_choice(run_dir, MATMUL_KEY, asdict(resolution_for_this_host))
    resolution = parse_resolution(MATMUL_KEY, shared) or resolution_for_this_host
    write_config(run_dir, _with_matmul_resolution(config, resolution))
    return resolution


def _with_matmul_resolution(config: RunConfig, resolution: ResolvedSetting) -> RunConfig:
    """The configuration with that choice of `run.matmul` among its substitutions."""
    return replace(config, substitutions={**config.substitutions, MATMUL_KEY: resolution})


def _runtime_with_library(first_library: Matmul, runtime: Runtime) -> Runtime:
    """Let this rank multiply matrices with the library that the run began with, since another one rounds differently.

    Returns the same runtime if it uses that library already. If this rank's host does not have it, the runtime uses BLAS, with
    the reason in `runtime.matmul.reason`.
    """
    assert runtime.matmul is not None
    if first_library in (runtime.matmul.library, Matmul.auto):
        return runtime
    switched = with_matmul(first_library, runtime)
    assert switched.matmul is not None
    if switched.matmul.library is first_library:
        reason = "as this run began"
    else:
        reason = f"this run began with {first_library}; {switched.matmul.reason}"
    return replace(switched, matmul=MatmulChoice(switched.matmul.library, reason))
