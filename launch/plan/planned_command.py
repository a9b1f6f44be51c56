"""The command that runs the best choice of a plan."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import NamedTuple

from trainer.config.run import LauncherConfig
from trainer.planner.plan import PlannedChoice, PlannedJob

MAX_COMMAND_COLUMNS = 80
"""Width of a command's lines, as terminals are wide at least."""


class PlannedCommand(NamedTuple):
    """The command that runs a choice of a plan."""

    lines: list[str]
    """The command, quoted for a shell: ["shardtune train model.path=... \\", "    strategy=fsdp2"]."""
    user_must_add: str
    """What is missing in the command, such as `with a budget of your own`; empty if it is complete."""


def planned_command_lines(overrides: list[str], best: PlannedChoice, job: PlannedJob) -> list[str]:
    """The lines of `planned_command`, then one in brackets on what the user must add, if anything."""
    command = planned_command(overrides, best, job)
    return [*command.lines, f"({command.user_must_add})"] if command.user_must_add else command.lines


def planned_command(overrides: list[str], best: PlannedChoice, job: PlannedJob) -> PlannedCommand:
    """Write the command that trains as the plan's best option does, for the user to copy, and what the user must add to it.

    `overrides`: those on the command line of the plan. The overrides that the plan has chosen (`best.overrides`) replace those
    of the same keys.
    """
    cli_keys = {override.split("=")[0] for override in overrides}
    chosen_keys = {override.split("=")[0] for override in best.overrides}
    is_for_cluster = _is_for_slurm(overrides, job)
    arguments = [override for override in overrides if override.split("=")[0] not in chosen_keys]
    # Added, because without a number of ranks a run takes all GPUs of the host, and under SLURM none.
    ranks_key = "launcher.gpus_per_node" if is_for_cluster else "launcher.processes"
    if ranks_key not in cli_keys:
        arguments.append(f"{ranks_key}={job.ranks_per_node}")

    verb = "shardtune submit" if is_for_cluster else "shardtune train"
    return PlannedCommand(
        lines=_folded_command(verb, [*arguments, *best.overrides]),
        user_must_add=_settings_to_add(best),
    )


def _folded_command(verb: str, arguments: list[str]) -> list[str]:
    r"""Write a command for a shell in lines of at most `MAX_COMMAND_COLUMNS`, each but the last ending in a backslash.

    Arguments are quoted. One that is longer has a line of its own.
    """
    lines = []
    line = verb
    for argument in arguments:
        quoted = shlex.quote(argument)
        if len(line) + len(quoted) + len("  \\") > MAX_COMMAND_COLUMNS:  # with a blank on either side of it
            lines.append(f"{line} \\")
            line = "   "
        line += f" {quoted}"
    return [*lines, line]


def _settings_to_add(best: PlannedChoice) -> str:
    """What a run needs and its plan did not: "with a budget and data.path of your own"; empty if nothing is missing."""
    missing_settings = []
    budget = best.variant.config.budget
    if not any((budget.steps, budget.epochs, budget.tokens)):
        missing_settings.append("a budget")
    data = best.variant.config.data
    if not data.path and not data.sources:
        missing_settings.append("data.path")
    return f"with {' and '.join(missing_settings)} of your own" if missing_settings else ""


def _is_for_slurm(overrides: list[str], job: PlannedJob) -> bool:
    """Decide whether a plan's command is `shardtune submit` (a SLURM job) or `shardtune train` (on this machine).

    An override `launcher=` decides. Without it, several nodes mean SLURM, and so do settings that only its launcher has
    (`LauncherConfig` has those of all launchers).
    """
    if "launcher=local" in overrides or "launcher=slurm" in overrides:
        return "launcher=slurm" in overrides
    common_settings = {f"launcher.{setting.name}" for setting in fields(LauncherConfig)}
    launcher_keys = {override.split("=")[0] for override in overrides if override.startswith("launcher.")}
    return job.num_nodes > 1 or not launcher_keys <= common_settings
