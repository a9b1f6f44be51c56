"""A fault for ranks: building the run is refused, as by a check that needs the model."""

from strategies.errors import ConfigError
from trainer.verification import steps


def refuse(*args, **kwargs):
    raise ConfigError("tuning.targets: planted")


steps.build_engine = refuse
