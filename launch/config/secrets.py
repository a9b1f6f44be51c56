"""Finds passwords and tokens among the values of a configuration."""

from collections.abc import Iterator
from dataclasses import asdict

from strategies.redaction import kind_of_secret_in
from trainer.config.resuming import flatten_settings
from trainer.config.run import RunConfig


def secret_problems(config: RunConfig, frozen_config: RunConfig | None) -> Iterator[str]:
    """A problem for each value of a configuration that looks like a password or token, since values do not stay private.

    They are written into config.yaml, the run record and the model card, and are sent to trackers.
    `frozen_config`: the configuration in the config.yaml of the run, whose values are not refused again; None if there is none
        yet.
    """
    frozen_values = {} if frozen_config is None else flatten_settings(asdict(frozen_config))  # by dotted key
    for key, value in flatten_settings(asdict(config)).items():
        if key in frozen_values and frozen_values[key] == value:
            continue
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            secret_kind = kind_of_secret_in(entry) if isinstance(entry, str) else None
            if secret_kind is not None:
                yield (
                    f"{key}: holds {secret_kind}, which would be written into config.yaml and the model card and sent to "
                    "trackers; leave it in the environment, or in a file that only you can read (as ~/.netrc for addresses)"
                )
