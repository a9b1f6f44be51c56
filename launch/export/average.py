"""`shardtune export average=last:3`: the mean of the weights that several checkpoints of a run would export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.checkpoints.config import CheckpointConfig
    from trainer.config.run import RunConfig


def checkpoints_to_average(run_dir: Path, average: str, config: RunConfig) -> list[Path]:
    """The sealed checkpoints that `average=last:<n>` or `average=[<step>,<step>]` names, oldest first. Errors: ConfigError."""
    from trainer.optim.config import OptimName

    if config.optim.name is OptimName.schedule_free:
        raise ConfigError(f"average={average}: optim=schedule_free exports an average already; leave it out")
    checkpoints = _checkpoint_by_step(run_dir, config.checkpoint)
    known = (
        f"{run_dir} has {', '.join(map(str, checkpoints)) or 'none'}; more are kept with checkpoint.keep and "
        "checkpoint.every_steps"
    )
    last, colon, count = average.partition(":")
    if (last, colon) == ("last", ":") and count.isdigit() and int(count) > 1:
        steps = sorted(checkpoints)[-int(count) :]
        if len(steps) < int(count):
            raise ConfigError(f"average={average}: there are not so many checkpoints; {known}")
    else:
        words = [word.strip() for word in average.removeprefix("[").removesuffix("]").split(",")]
        if len(set(words)) < 2 or not all(word.isdigit() for word in words) or not average.startswith("["):
            raise ConfigError(f"average={average}: must be last:<n> of two or more, or a list of steps; {known}")
        steps = sorted({int(word) for word in words})
        missing = [step for step in steps if step not in checkpoints]
        if missing:
            raise ConfigError(f"average={average}: there is no checkpoint of step {missing[0]}; {known}")
    return [_check_complete(checkpoints[step], average) for step in steps]


def _checkpoint_by_step(run_dir: Path, config: CheckpointConfig) -> dict[int, Path]:
    from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in

    return dict(checkpoints_in(checkpoint_dirs_of(run_dir, config.fallback_dir)))


def _check_complete(path: Path, average: str) -> Path:
    from trainer.checkpoints.manifest import verify

    if problem := verify(path):
        raise ConfigError(f"average={average}: {path} {problem}; leave it out with a list of steps")
    return path


def load_mean(engine: Any, checkpoints: list[Path]) -> Any:
    """Load the mean of the weights that each checkpoint would export into a `single` engine; returns the newest progress.

    Sums are in float64. Errors: those of loading.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    progress = None
    for path in checkpoints:
        progress = engine.load(path)
        for name, tensor in engine.gather(trainable_only=True):
            if name in sums:
                sums[name].add_(tensor.double())
            else:
                sums[name] = tensor.double()
    engine.average = None  # if the run averages steps too, that average is already in the sums
    with torch.no_grad():
        for name, parameter in engine.trainable:
            parameter.copy_(sums[name].div_(len(checkpoints)))
    return progress
