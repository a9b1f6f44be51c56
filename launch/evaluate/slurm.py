"""`shardtune evaluate ... launcher=slurm`: submits a one-node job that runs the same arguments.

An evaluation has no state to resume from. So the script does not requeue, and if SLURM restarts it, it starts over.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster import advice, slurm
from launch.cluster.sbatch_environment import refuse_gpus_of_environment
from launch.cluster.submission import sbatch_variable_lines, submit_script
from strategies.errors import ConfigError, StorageError
from trainer.config.run import SlurmConfig
from trainer.reporting.code_revision import CODE_DIRECTORY

if TYPE_CHECKING:
    from launch.evaluate.plan import EvaluationPlan

SCRIPT_FILE = "evaluate.sbatch"


def evaluation_script(evaluation_plan: EvaluationPlan, arguments: list[str]) -> str:
    """Write the sbatch script of a SLURM job that evaluates on one node, with the `arguments` of the command line.

    Relative paths start at the current directory. Errors: ConfigError for settings that a script cannot carry, or that ask
    for several nodes.
    """
    launcher = evaluation_plan.config.launcher
    assert isinstance(launcher, SlurmConfig)
    if launcher.nodes != 1:
        raise ConfigError(
            f"launcher.nodes={launcher.nodes}: an evaluation is submitted to one node; within an allocation of several start it "
            "on every rank: srun python -m launch.evaluate <settings>"
        )
    if launcher.container is not None:
        raise ConfigError(
            f"launcher.container={launcher.container}: an evaluation is submitted without an image; start it in the image on a "
            "node: srun --container-image=... python -m launch.evaluate <settings>"
        )
    # Within the job the same command runs on the node itself.
    node_arguments = [argument for argument in arguments if not argument.startswith(("launcher=", "launcher."))]
    node_arguments += ["launcher=local", f"launcher.processes={launcher.per_node}"]
    python = slurm.checked_line(launcher.python or sys.executable, "launcher.python")
    quoted_arguments = " ".join(slurm.checked_line(shlex.quote(argument), argument) for argument in node_arguments)
    options = slurm.sbatch_options(launcher, [str(evaluation_plan.job_dir.absolute())], Path.cwd())
    lines = [
        "#!/bin/bash",
        "# Rendered by shardtune evaluate; to change it, submit again with other settings.",
        *(f"#SBATCH {option}" for option in options),
        "",
        "set -e",
        "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1",
        f"export PYTHONPATH={shlex.quote(str(CODE_DIRECTORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # Defines the shell function `setup`.
        slurm.setup_function_text(launcher, CODE_DIRECTORY).rstrip(),
        "setup",
        f"exec {shlex.quote(python)} -m launch.main evaluate {quoted_arguments}",
    ]
    return "\n".join(lines) + "\n"


def submit_evaluation(evaluation_plan: EvaluationPlan, arguments: list[str], *, print_only: bool) -> None:
    """Submit an evaluation as a SLURM job, or with `print_only` print its script.

    The script lies beside the records of the evaluation. Errors: those of `submit_script`, StorageError.
    """
    script_text = evaluation_script(evaluation_plan, arguments)
    assert isinstance(evaluation_plan.config.launcher, SlurmConfig)
    rank_notes = advice.rank_layout_notes(evaluation_plan.config.launcher)
    if print_only:
        for line in rank_notes:
            print(f"# {line}", file=sys.stderr)
        print(script_text, end="")
        return
    if evaluation_plan.config.launcher.gpus_per_node_request is None:
        # No rank would be counted for GPUs that only a variable SBATCH_* asks for.
        refuse_gpus_of_environment()
    logs = evaluation_plan.job_dir / "logs"
    script = evaluation_plan.job_dir.absolute() / SCRIPT_FILE
    try:
        # Without this directory SLURM cannot write the job's output.
        logs.mkdir(parents=True, exist_ok=True)
        script.write_text(script_text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the job script: {error}; choose another to=<directory>") from error
    job = submit_script(script, [])
    print(f"submitted job {job}: {script}")
    for line in [*rank_notes, *sbatch_variable_lines(script_text), f"queue   squeue --job {job}"]:
        print(f"  {line}")
    print(f"  output  below {shlex.quote(str(logs))}; the job's exit code is the evaluation's")
