"""W&B's environment variables. They apply if no setting does; one that a setting overrides is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.reporting.config import LoggingConfig, WandbMode
from trainer.reporting.resolution import ResolvedSetting

VARIABLE_BY_SETTING = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "name": "WANDB_NAME",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
}
"""The environment variable that a setting of `logging` takes its value from if it is not set."""
MODE_BY_WANDB_MODE = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""`logging.wandb` by the value of WANDB_MODE; `run` and `dryrun` are old spellings."""
MODE_WITHOUT_SETTING = "shared"
"""W&B's mode for several processes that write one run. `logging.wandb` has no such value; W&B accepts the variable."""


@dataclass(frozen=True, slots=True)
class LoggingFromEnvironment:
    """Settings with what the environment decides."""

    config: LoggingConfig
    resolutions: dict[str, ResolvedSetting]
    """What the environment decided, by setting, such as `logging.project`. As text: `mine (WANDB_PROJECT)`."""
    passed_over: str | None
    """One line that names the variables that lose to a setting; None if no variable does."""


def wandb_mode_problems(config: LoggingConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """An error message if WANDB_MODE, among the variables `environment`, is a word that W&B does not know, such as `ofline`.

    W&B's client reads the variable by itself, whatever `logging.wandb` says, and raises for such a word when the run begins.
    The run would then train without a record in W&B. No message if `logging.wandb=disabled`, because the client is not
    started then.
    """
    mode_text = environment.get("WANDB_MODE")
    if mode_text is None or config.wandb is WandbMode.disabled:
        return
    if mode_text not in (*MODE_BY_WANDB_MODE, MODE_WITHOUT_SETTING):  # W&B accepts no upper case, and no empty value
        yield f"WANDB_MODE={mode_text}: must be online, offline or disabled; correct the environment variable, or unset it"


def apply_environment(config: LoggingConfig, environment: Mapping[str, str]) -> LoggingFromEnvironment:
    """Complete the settings of `logging` by W&B's environment variables: a setting wins over its variable, that over the default.

    With WANDB_PROJECT=mine, an empty `logging.project` becomes `mine`, and `resolutions` says so. If `logging.project` is
    another name already, it stays, and `passed_over` names the variable.
    """
    resolutions: dict[str, ResolvedSetting] = {}
    passed_over: list[str] = []
    changes: dict[str, Any] = {}
    for name, variable in VARIABLE_BY_SETTING.items():
        text = environment.get(variable, "").strip()
        value: Any = text
        if name == "tags":  # WANDB_TAGS=a,b is the list [a, b]
            tags = [tag.strip() for tag in text.split(",")]
            value = [tag for tag in tags if tag]
        if not value:
            continue
        configured = getattr(config, name)
        if not configured:
            changes[name] = value
            resolutions[f"logging.{name}"] = ResolvedSetting(
                f"logging.{name}", asked=None, chosen=text, reason=variable
            )
        elif configured != value:
            passed_over.append(f"{variable}={text} (logging.{name} is set)")

    # WANDB_MODE decides only if `logging.wandb` is auto. Without the variable, auto is offline.
    changes["wandb"] = config.wandb
    mode_text = environment.get("WANDB_MODE", "").strip().lower()
    mode = MODE_BY_WANDB_MODE.get(mode_text)
    if mode_text and mode is None:
        passed_over.append(f"WANDB_MODE={mode_text} (is none of online, offline and disabled)")
    if config.wandb is WandbMode.auto:
        changes["wandb"] = WandbMode(mode or "offline")
        if mode:
            resolutions["logging.wandb"] = ResolvedSetting(
                "logging.wandb", asked=None, chosen=mode, reason="WANDB_MODE"
            )
    elif mode and mode != config.wandb:
        passed_over.append(f"WANDB_MODE={mode_text} (logging.wandb={config.wandb} is set)")
    passed_over_line = f"passed over: {', '.join(passed_over)}" if passed_over else None
    return LoggingFromEnvironment(replace(config, **changes), resolutions, passed_over_line)
