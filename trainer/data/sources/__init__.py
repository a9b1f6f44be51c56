"""Where rows come from: files of every supported kind, and hub data sets."""

from trainer.data.sources.hub import open_hub
from trainer.data.sources.paths import expand
from trainer.data.sources.read import inputs_of, read
from trainer.data.sources.row import BadRow, Row

__all__ = ["BadRow", "Row", "expand", "inputs_of", "open_hub", "read"]
