"""A run on W&B's server, and whether that server is reachable."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from strategies.errors import ConfigError
from trainer.reporting.trackers.reachable import unreachable

TIMEOUT_S = 30
"""Seconds for each answer of a server that is there."""


@dataclass(frozen=True, slots=True)
class ServerRun:
    """What the server has of a run."""

    config: dict[str, Any]
    summary: dict[str, Any]
    state: str
    """`running`, `finished`, `crashed`, `failed`, `killed`, `preempted`, in its words."""
    rows: list[dict[str, Any]]
    """Of its history, all of them."""
    created: str
    """When it began, in ISO 8601."""


def fetch(entity: str, project: str, run: str) -> ServerRun:
    """Ask for a run. Raises ConfigError where it cannot be had, within 10 seconds where there is no network."""
    name = f"wandb:{entity}/{project}/{run}"
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"{name}: is read by wandb, which is not installed: pip install wandb") from None
    if (why := no_server()) is not None:
        raise ConfigError(
            f"{name}: {why}; the run's directory, or the files that W&B keeps on its machine, need no server"
        )
    try:
        server_run = wandb.Api(timeout=TIMEOUT_S).run(f"{entity}/{project}/{run}")
        return ServerRun(
            config=dict(server_run.config),
            summary=dict(server_run.summary_metrics),
            state=str(server_run.state),
            rows=[dict(row) for row in server_run.scan_history(use_cache=False)],
            created=str(server_run.created_at),
        )
    except (wandb.Error, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{name}: {address()} does not give it ({why}); look at its name, and at what your key may read"
        ) from None


def no_server() -> str | None:
    """Why no server can be asked; None where one can."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key):
        return "no W&B API key is configured"
    why = unreachable(address())
    return f"{address()} cannot be reached: {why}" if why else None


def address() -> str:
    """Of the server that is configured."""
    import wandb

    return str(wandb.setup().settings.base_url)
