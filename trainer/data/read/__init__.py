"""Where rows come from: files of every supported kind, and hub data sets."""

from trainer.data.read.dispatch import inputs_of, read
from trainer.data.read.hub import open_hub
from trainer.data.read.paths import expand
from trainer.data.read.row import Row

__all__ = ["Row", "expand", "inputs_of", "open_hub", "read"]
