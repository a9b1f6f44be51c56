"""W&B's environment variables. They apply if no setting does; one that a setting overrides is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.reporting.config import LoggingConfig, WandbMode
from trainer.reporting.resolution import Resolution

VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "name": "WANDB_NAME",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
}
"""Settings of `logging`, and the variable that each takes where it is not set."""
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""Values of WANDB_MODE, two of them old spellings."""


@dataclass(frozen=True, slots=True)
class Settled:
    """Settings with what the environment decides."""

    config: LoggingConfig
    resolutions: dict[str, Resolution]
    """What it decided, by setting. `str` of one that is of `logging.project` is `mine (WANDB_PROJECT)`."""
    passed_over: str | None
    """One line on the variables that lose to a setting; None where none does."""


def settle(config: LoggingConfig, environment: Mapping[str, str]) -> Settled:
    """The settings as they hold in this environment: what is set wins, else the variable, else the default."""
    resolutions: dict[str, Resolution] = {}
    lost: list[str] = []
    changes: dict[str, Any] = {}
    for key, variable in VARIABLES.items():
        given = environment.get(variable, "").strip()
        value: Any = [tag.strip() for tag in given.split(",") if tag.strip()] if key == "tags" else given
        if not value:
            continue
        if not getattr(config, key):
            changes[key] = value
            resolutions[f"logging.{key}"] = Resolution(f"logging.{key}", asked=None, chosen=given, reason=variable)
        elif getattr(config, key) != value:
            lost.append(f"{variable}={given} (logging.{key} is set)")
    changes["wandb"] = config.wandb
    given = environment.get("WANDB_MODE", "").strip().lower()
    asked = MODES.get(given)
    if given and asked is None:
        lost.append(f"WANDB_MODE={given} (is none of online, offline and disabled)")
    if config.wandb is WandbMode.auto:
        changes["wandb"] = WandbMode(asked or "offline")
        if asked:
            resolutions["logging.wandb"] = Resolution("logging.wandb", asked=None, chosen=asked, reason="WANDB_MODE")
    elif asked and asked != config.wandb:
        lost.append(f"WANDB_MODE={given} (logging.wandb={config.wandb} is set)")
    line = f"passed over: {', '.join(lost)}" if lost else None
    return Settled(replace(config, **changes), resolutions, line)
