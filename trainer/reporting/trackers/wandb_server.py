"""A run on W&B's server, and whether that server is reachable."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from strategies.errors import ConfigError
from trainer.reporting.trackers.reachable import unreachable_reason

ANSWER_TIMEOUT_S = 30
"""Seconds for each answer of a server that is there."""
LABELS_TIMEOUT_S = 10
"""Seconds for each answer about the labels of a run that ends: a job that is to end has no more time."""


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


@dataclass(frozen=True, slots=True)
class RunLabels:
    """What people change of a run in W&B's app."""

    name: str
    notes: str | None
    tags: list[str]


def fetch_run_labels(entity: str, project: str, run: str) -> RunLabels:
    """The labels that a run has on W&B's server now. Raises whatever W&B's client raises if it cannot read them."""
    import wandb

    server_run = wandb.Api(timeout=LABELS_TIMEOUT_S).run(f"{entity}/{project}/{run}")
    return RunLabels(str(server_run.name or run), server_run.notes, list(server_run.tags or ()))


def fetch_wandb_run(entity: str, project: str, run: str) -> ServerRun:
    """Fetch a run that was recorded in W&B, with its whole history, to compare it with others. `run`: its id, such as `3k9xw2ab`.

    Raises ConfigError if the server does not give it, within 10 seconds if there is no network.
    """
    name = f"wandb:{entity}/{project}/{run}"
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"{name}: is read by wandb, which is not installed: pip install wandb") from None
    server_problem = wandb_server_problem()
    if server_problem is not None:
        raise ConfigError(
            f"{name}: {server_problem}; the run's directory, or the files that W&B keeps on its machine, need no server"
        )
    try:
        server_run = wandb.Api(timeout=ANSWER_TIMEOUT_S).run(f"{entity}/{project}/{run}")
        return ServerRun(
            config=dict(server_run.config),
            summary=dict(server_run.summary_metrics),
            state=str(server_run.state),
            rows=[dict(row) for row in server_run.scan_history(use_cache=False)],
            created=str(server_run.created_at),
        )
    except (wandb.Error, OSError, ValueError, RuntimeError) as error:
        one_line = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{name}: {wandb_server_address()} does not give it ({one_line}); look at its name, and at what your key may read"
        ) from None


def wandb_server_problem() -> str | None:
    """Why W&B's server cannot be used (no API key, or no answer); None if it can."""
    import wandb

    has_key_in_environment = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not has_key_in_environment and not wandb.api.api_key:
        return "no W&B API key is configured"
    problem = unreachable_reason(wandb_server_address())
    return f"{wandb_server_address()} cannot be reached: {problem}" if problem else None


def wandb_server_address() -> str:
    """The address of the W&B server that is configured."""
    import wandb

    return str(wandb.setup().settings.base_url)
