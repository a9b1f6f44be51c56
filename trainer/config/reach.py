"""Whether a setting only describes the run or reaches out of it (`strategies.settings.Reach`)."""

from __future__ import annotations

from strategies.settings import Reach
from trainer.config.tree import metadata_by_key, nearest_metadata

GROUPS_OF_EACH_START = ("run", "launcher")
"""Groups that no verb takes from a run that it reads: each start has its own."""
USER_NAMED_TABLES = tuple({key.partition(".*")[0]: None for key in metadata_by_key() if ".*" in key})
"""Keys of tables whose entries have a name that the user chooses, such as `evaluation.tasks`."""


def reach_of(key: str) -> Reach:
    """The class of a setting, also of one value in a table, such as `evaluation.tasks.facts.options.terms`.

    Raises KeyError for a setting that the tree does not know.
    """
    parts = key.split(".")
    if ".".join(parts[:2]) in USER_NAMED_TABLES and len(parts) > 2:
        parts[2] = "*"
    return nearest_metadata(".".join(parts), lambda metadata: metadata.reach)
