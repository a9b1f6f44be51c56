"""`SBATCH_*` variables, which sbatch prefers to the lines of a script. Settings of a run win over them.

A variable for an option that the run leaves open is passed on. The user is told which are passed on and which are
not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from strategies.errors import ConfigError
from trainer.config.sbatch_options import GPU_OPTIONS, parse_sbatch_options

SBATCH_PREFIX = "SBATCH_"
OPTION_BY_SUFFIX = {"TIMELIMIT": "time", "ARRAY_INX": "array", "MEM_PER_NODE": "mem"}
"""Variables that are not called like their option."""
REASON_BY_SCRIPT_OPTION = {
    "array": "one job has one run, and -m makes arrays",
    "error": "the logs lie in the run's directory",
    "open-mode": "a requeued job appends to its logs",
    "output": "the logs lie in the run's directory",
    "signal": "the script expects USR2 at the time of launcher.signal_lead_s",
    "job-name": "launcher.job_name names the job",
    "requeue": "the script requeues by launcher.retry",
    "no-requeue": "the script requeues by launcher.retry",
    "wait": "the command does not wait for the job",
}
"""Options that the environment never decides, and why."""
EXCLUSIVE_GROUPS = (
    frozenset({"mem", "mem-per-cpu", "mem-per-gpu"}),
    frozenset({"cpus-per-task", "cpus-per-gpu"}),
)
"""Options of which a job has one."""


@dataclass(slots=True)
class SbatchVariables:
    """The user's `SBATCH_*` variables, which sbatch prefers to a script's own lines, sorted for one job script."""

    passed_on: dict[str, str] = field(default_factory=dict)
    """The variables that sbatch gets, with their values: the script leaves their options open."""
    dropped: dict[str, str] = field(default_factory=dict)
    """The other variables, with why each is not passed on."""

    def lines(self) -> list[str]:
        """A line for people about each variable."""
        lines = [f"environ {name}={value} is passed on to sbatch" for name, value in self.passed_on.items()]
        return lines + [f"environ {name} is not passed on: {why}" for name, why in self.dropped.items()]


def script_options(script_text: str) -> dict[str, str]:
    """The options of sbatch in the `#SBATCH` lines of a job script, by name: {"nodes": "2", "requeue": ""}."""
    marker = "#SBATCH "
    return parse_sbatch_options(
        line.removeprefix(marker) for line in script_text.splitlines() if line.startswith(marker)
    )


def sort_sbatch_variables(script_text: str, environment: Mapping[str, str] = os.environ) -> SbatchVariables:
    """Sort the user's `SBATCH_*` variables into those that reach sbatch and those whose option the job script decides.

    sbatch would prefer such a variable to the script's own line. With `#SBATCH --time=1:00:00` in the script, SBATCH_TIMELIMIT is
    dropped; without it, it reaches sbatch.
    """
    options_of_script = script_options(script_text)
    variables = SbatchVariables()
    for name, value in sorted(environment.items()):
        if not name.startswith(SBATCH_PREFIX):
            continue
        reason = _reason_environment_may_not_set(_option_of_variable(name), options_of_script)
        if reason is None:
            variables.passed_on[name] = value
        else:
            variables.dropped[name] = reason
    return variables


def _option_of_variable(variable: str) -> str:
    """The option of sbatch that a variable `SBATCH_*` sets: "SBATCH_MEM_PER_CPU" -> "mem-per-cpu"."""
    suffix = variable.removeprefix(SBATCH_PREFIX)
    return OPTION_BY_SUFFIX.get(suffix, suffix.lower().replace("_", "-"))


def _reason_environment_may_not_set(option: str, script_options: Mapping[str, str]) -> str | None:
    """Why a variable `SBATCH_*` may not set an option of sbatch for a job script; None if it may.

    `option`: such as "time". `script_options`: those in the script's `#SBATCH` lines.
    It may not in these cases:

    - the option is always the script's (`REASON_BY_SCRIPT_OPTION`);
    - the script sets it itself;
    - it requests GPUs, because ranks are counted by the run's GPUs;
    - the script sets another option that excludes it (`EXCLUSIVE_GROUPS`).
    """
    if option in REASON_BY_SCRIPT_OPTION:
        return REASON_BY_SCRIPT_OPTION[option]
    if option in script_options:
        value_text = f"={script_options[option]}" if script_options[option] else ""
        return f"the run says --{option}{value_text}"
    if option in GPU_OPTIONS:
        return "the ranks are counted by the run's GPUs"
    for group in EXCLUSIVE_GROUPS:
        excluding_options = [name for name in group if name in script_options]
        if option in group and excluding_options:
            excluding_option = excluding_options[0]
            return f"the run says --{excluding_option}={script_options[excluding_option]}"
    return None


def sbatch_environment(script_text: str) -> dict[str, str]:
    """The environment variables with which sbatch is called for a job script, so that none overrides the run's settings.

    `script_text`: the script.
    Left out: `SBATCH_*` variables whose option the script decides; within a job, all variables of that job.
    """
    if "SLURM_JOB_ID" in os.environ:
        # Submitted from within a job: the variables of that job would give the new one its limits.
        prefixes = ("SLURM_", "SRUN_", SBATCH_PREFIX)
        env = {}
        for name, value in os.environ.items():
            # SLURM_CONF says where the cluster's configuration is, and is no job's.
            if name == "SLURM_CONF" or not name.startswith(prefixes):
                env[name] = value
        return env
    dropped_variables = sort_sbatch_variables(script_text).dropped
    return {name: value for name, value in os.environ.items() if name not in dropped_variables}


def sbatch_environment_value(option: str) -> str | None:
    """The value that a variable `SBATCH_*` gives an option of sbatch that the run leaves open: "time" -> "1:00:00".

    None if no variable sets it, or within a job, whose variables do not count for another.
    """
    if "SLURM_JOB_ID" in os.environ:
        return None
    for name, value in os.environ.items():
        if name.startswith(SBATCH_PREFIX) and _option_of_variable(name) == option:
            return value
    return None


def refuse_gpus_of_environment() -> None:
    """Raise ConfigError for GPUs that only a variable `SBATCH_*` asks for, since no rank would be counted for them.

    Within a job nothing is refused: its variables do not reach the new job (`sbatch_environment`).
    """
    if "SLURM_JOB_ID" in os.environ:
        return
    gpu_variables = []
    for name, value in sorted(os.environ.items()):
        if name.startswith(SBATCH_PREFIX) and _option_of_variable(name) in GPU_OPTIONS:
            gpu_variables.append(f"{name}={value}")
    if gpu_variables:
        raise ConfigError(
            f"{' '.join(gpu_variables)}: the environment asks for GPUs, and this run for none, so that it would train on one; "
            "set launcher.gpus_per_node or launcher.gres, or unset the variable"
        )
