"""Writes the sbatch script of a run from the launcher's settings.

Settings that a script cannot carry are refused: line breaks, and backslashes in paths. slurm/README.md explains what
the script does, signal by signal.
"""

import re
import shlex
import sys
from pathlib import Path

from launch.cluster import containers
from launch.cluster.containers import INSIDE_CONTAINER
from launch.config import trusted_values
from strategies.errors import ConfigError
from trainer.config.resuming import settings_as_dict
from trainer.config.run import RunConfig, SlurmConfig

OptionValues = dict[str, str | int | None]
"""Options of sbatch or srun by their names; True for one without a value, None for one that is left out."""
# The part that is the same in slurm/train.sbatch (a test compares them). Above it a script sets patience, python and the array
# `words`, exports what launch/cluster/job.py reads, and defines the function `setup`.
TRAIN_SCRIPT_BODY = r"""
# ---- From here on slurm/train.sbatch and launch/cluster/slurm.py are the same, line for line.
set -e
warned='' stopped='' step='' repeats=''
# A signal is kept from the first line on. USR2, near the time limit or by `scancel --batch --signal=USR2`: save, be requeued.
trap 'warned=1$warned; pass_on' USR2
# Time limit, scancel, end of a preemption: the steps get it too and need this shell to wait. `shardtune stop` sends it here.
trap 'stopped=1$stopped; pass_on' TERM
pass_on() { # to the ranks, again and again: while they load their libraries they miss it
  if [ -z "$step" ] || [ -n "$repeats" ]; then return 0; fi
  (trap '' USR2 && trap - TERM && while kill -USR2 "$step" 2>/dev/null; do sleep 5; done) &
  repeats=$!
}
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # a trainer.py where the job was submitted hides nothing
# As text: a shell between srun and bash (dash) drops exported functions.
SHARDTUNE_SETUP=$(declare -f setup)
export SHARDTUNE_SETUP SHARDTUNE_PYTHON=$python
# Which run this is, whether it may start, and where its ranks meet: lines that set run_dir, logs, job, processes, rendezvous ...
said=$(
  trap '' USR2
  bash -c 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"' setup "$python" -m launch.job begin "${words[@]}"
)
eval "$said"
if [ -n "$code" ]; then export PYTHONPATH=$code:$PYTHONPATH; fi # the copy that the first start has made
if [ -n "$finished" ]; then exit 0; fi

export SHARDTUNE_RUN_DIR=$run_dir SHARDTUNE_CONFIG=$run_dir/config.yaml OMP_NUM_THREADS=$threads SHARDTUNE_SILENT=$silent
if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun no longer takes it over
export retry_preempted retry_node_fail retry_out_of_memory
# Exit codes do not survive torchrun: what the run wrote down decides whether the job is requeued.
settle() { # the code of the step, and 1 if no rank was started
  trap '' USR2
  bash -c 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"' setup "$python" -m launch.job end "$1" "$stopped" "$2"
}
if [ -n "$warned$stopped" ]; then
  rc=0
  settle 75 1 || rc=$?
  exit "$rc"
fi
nodes=$SLURM_JOB_NUM_NODES
echo "job $job, start $start, on $SLURM_JOB_NODELIST: $nodes x $processes processes, rendezvous $rendezvous, $logs"

# SLURM sends TERM to every process of the step, and USR2 comes through srun. Either would end torchrun, so it is started with
# both ignored; the workers have their own handling. After one node's end the others have $patience seconds to come to theirs.
# Each node's launch.torchrun writes down which of its ranks was killed, and whether for memory. Ranks are numbered in SLURM's
# order of nodes.
(
  trap '' USR2 # srun passes it on as soon as it can, and does not die of it before
  exec srun --export=ALL,SHARDTUNE_INSIDE=1 "${container[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    --cpu-bind=none --kill-on-bad-exit=0 --wait="$patience" --open-mode=append --output="${logs//%/%%}/%x-%j-%t.log" \
    "${within[@]}" bash -c 'set -e; eval "$SHARDTUNE_SETUP"; setup; trap "" USR2 TERM
      exec "$0" -m launch.torchrun --node-rank="$SLURM_NODEID" "$@"' \
    "${inside:-$python}" --nnodes="$nodes" --nproc-per-node="$processes" --max-restarts=0 --rdzv-backend=static \
    --rdzv-endpoint="$rendezvous" --rdzv-id="$SLURM_JOB_ID" --signals-to-handle=SIGINT -m launch.train
) &
step=$!
if [ -n "$warned$stopped" ]; then pass_on; fi # it came in this moment
# A trapped signal ends `wait`, not the step.
while true; do
  rc=0 before=$warned-$stopped
  wait "$step" || rc=$?
  if [ "$before" = "$warned-$stopped" ] && ! kill -0 "$step" 2>/dev/null; then break; fi
done
if [ -n "$repeats" ]; then kill "$repeats" 2>/dev/null || true; fi
if [ "$rc" -lt 0 ]; then rc=1; fi # what bash says where step and signal come in the same moment
settle "$rc" ""
"""


def render_train_script(config: RunConfig, run_dirs: list[Path], *, code_dir: Path, cwd: Path | None = None) -> str:
    """Write the text of the job script that trains in `run_dirs[0]`, or as a job array in each of several directories.

    `code_dir`: the code that the job runs, the clone of shardtune or its copy.
    `cwd`: where relative paths of the settings start; None for the current directory.
    Raises ConfigError for settings that are not SLURM's or that a script cannot carry.
    """
    return "\n".join(script_head_lines(config, run_dirs, code_dir=code_dir, cwd=cwd)) + "\n" + TRAIN_SCRIPT_BODY


def script_head_lines(config: RunConfig, run_dirs: list[Path], *, code_dir: Path, cwd: Path | None = None) -> list[str]:
    """The lines of a job script that depend on the run, up to its shell function `setup`; the rest is the same for all runs.

    They have the options of sbatch, the runs, the interpreter and the code. The body of the script (`TRAIN_SCRIPT_BODY`) reads
    the shell variables that are set here: `runs`; `patience`, the seconds that nodes have to end after the first one; `words`,
    the overrides of the command line, none here; and those of `_interpreter_lines`.

    `code_dir`: the code that the job runs.
    `cwd`: where relative paths of the settings start; None for the current directory.
    Raises ConfigError for settings that are not SLURM's, or that a script cannot carry.
    """
    slurm = config.launcher
    if not isinstance(slurm, SlurmConfig):
        raise ConfigError(
            f"launcher.name is {slurm.name.value!r}, but only a SLURM job can be submitted: launcher=slurm"
        )
    if not run_dirs:
        raise ConfigError("no run to submit")
    run_paths = [_checked_path(run_dir.absolute(), "run.dir") for run_dir in run_dirs]
    quoted_runs = " ".join(shlex.quote(run_path) for run_path in run_paths)
    quoted_code_dir = shlex.quote(_checked_path(code_dir, "the installation"))
    return [
        "#!/bin/bash",
        "# shellcheck disable=SC2016,SC2034,SC2154 # quoted for the shells of the nodes; set, or used, by what is not here",
        "# Rendered from the config of the run; to change it change the launcher's settings and submit again.",
        *(f"#SBATCH {option}" for option in sbatch_options(slurm, run_paths, cwd or Path.cwd())),
        "",
        f"runs=({quoted_runs})",
        "export SHARDTUNE_CONFIG=${runs[${SLURM_ARRAY_TASK_ID:-0}]}/config.yaml",
        f"patience={config.run.timeout_s} # seconds",
        *_interpreter_lines(config, slurm, [code_dir, *run_dirs]),
        "words=()",
        f"export PYTHONPATH={quoted_code_dir}${{PYTHONPATH:+:$PYTHONPATH}}",
        *setup_function_text(slurm, code_dir).splitlines(),
    ]


def _interpreter_lines(config: RunConfig, slurm: SlurmConfig, directories: list[Path]) -> list[str]:
    """The lines of a job script that say which Python runs on the host and as ranks, and how ranks start in a container.

    They set `python` (the interpreter on the host), `inside` (that of the ranks in the container), `container` (options of srun)
    and `within` (what stands before the command of the ranks); these three are empty without a container.
    `directories`: mounted beside the paths of the settings.
    """
    if slurm.container is None:
        python = shlex.quote(checked_line(slurm.python or sys.executable, "launcher.python"))
        return [f"python={python} inside='' container=() within=()"]
    lines = []
    trusted_directory = trusted_values.trusted_values_directory()
    if trusted_directory is not None:  # in the container the home may be another one
        variable = trusted_values.STATE_DIRECTORY_VARIABLE
        lines.append(f"export {variable}={shlex.quote(_checked_path(trusted_directory, variable))}")
    host_python = shlex.quote(checked_line(sys.executable, "the interpreter"))
    rank_python = shlex.quote(checked_line(slurm.python or "python3", "launcher.python"))
    container = containers.container_command(settings_as_dict(config), directories)
    return [
        *lines,
        f"python={host_python} # asks SLURM, on the host",
        f"inside={rank_python} # of the ranks, in the container",
        f"container=({_shell_arguments(container.srun_options)})",
        f"within=({_shell_arguments(container.prefix)})",
    ]


def _shell_arguments(arguments: list[str]) -> str:
    """The arguments of a command, quoted for the shell, with blanks between them."""
    return " ".join(shlex.quote(checked_line(argument, "launcher.container")) for argument in arguments)


def setup_function_text(slurm: SlurmConfig, code_dir: Path) -> str:
    """The shell function `setup` of a job script, which prepares the environment on every node before Python starts.

    It sources slurm/env.sh, the site's file, and runs the lines of `launcher.setup`. With a container the first is done on the
    host, the second in the container. Raises ConfigError for a line of `launcher.setup` that a script cannot carry.
    """
    site_file = shlex.quote(str(code_dir / "slurm" / "env.sh"))
    source_site_file = f"if [ -f {site_file} ]; then . {site_file}; elif [ -f slurm/env.sh ]; then . slurm/env.sh; fi"
    if slurm.container is None:
        lines = ["setup() { # on every node, before training", f"  {source_site_file}"]
    else:
        lines = ["setup() { # the site's environment on the host, the lines of the launcher in the container"]
        lines += [f'  if [ -z "${INSIDE_CONTAINER}" ]; then {source_site_file}; return; fi']
    lines += [f"  {checked_line(line, 'launcher.setup')}" for line in slurm.setup]
    return "\n".join([*lines, "}"]) + "\n"


def sbatch_options(slurm: SlurmConfig, runs: list[str], cwd: Path) -> list[str]:
    """The options of sbatch for a job script's `#SBATCH` lines, such as `--nodes=2`, quoted for sbatch, which takes shell quotes.

    `runs`: the run directories; several make a job array. `cwd`: the working directory of the job.
    """
    is_array = len(runs) > 1
    dependencies = _job_dependencies(slurm)
    log_dir = f"{runs[0]}/logs".replace("%", "%%")  # sbatch reads %j and the like in the name of the output
    # A signal for the batch shell (B:), which asks the ranks to save before the time limit.
    signal = f"B:USR2@{slurm.signal_lead_s}" if slurm.signal_lead_s else None
    option_values: OptionValues = {
        "job-name": slurm.job_name or default_job_name(runs),
        "array": _array_tasks(len(runs), slurm.array_limit) if is_array else None,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        **node_request(slurm),
        "time": slurm.time,
        "chdir": _checked_path(cwd, "the current directory"),
        "output": f"{log_dir}/%x-%A_%a.out" if is_array else f"{log_dir}/%x-%j.out",
        "open-mode": "append",
        "signal": signal,
        "comment": slurm.comment,
        "dependency": ",".join(dependencies) or None,
        "kill-on-invalid-dep": "yes" if dependencies else None,
        "mail-type": slurm.mail,
        "mail-user": slurm.mail_user,
    }
    extra_options = [checked_line(option, "launcher.extra") for option in slurm.extra]
    return [*quoted_options(option_values), "--requeue", *extra_options]


def _array_tasks(num_tasks: int, max_running: int | None) -> str:
    """The tasks of a job array as sbatch takes them: 8, 2 -> "0-7%2", tasks 0 to 7 of which two run at a time (None: all)."""
    limit = f"%{max_running}" if max_running else ""
    return f"0-{num_tasks - 1}{limit}"


def _job_dependencies(slurm: SlurmConfig) -> list[str]:
    """What a job waits for, as sbatch takes it: that the job `launcher.after` has succeeded, and the user's own conditions."""
    dependencies = []
    if slurm.after:
        dependencies.append(f"afterok:{slurm.after}")
    if slurm.dependency:
        dependencies.append(slurm.dependency)
    return dependencies


def node_request(slurm: SlurmConfig) -> OptionValues:
    """What a run asks SLURM for on each node, as options of sbatch and srun: {"gpus-per-node": 8, "mem": "64G", ...}.

    None for what the run leaves open; True for an option without a value.
    """
    return {
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "gres": slurm.gres,
        "exclude": slurm.exclude,
        "exclusive": slurm.exclusive or None,
    }


def quoted_options(options: OptionValues) -> list[str]:
    """Options as `--name=value`, quoted as a shell and sbatch read it; those that are None are left out.

    {"nodes": 2, "comment": "a b", "exclusive": True, "mem": None} -> ["--nodes=2", "--comment='a b'", "--exclusive"]: True is an
    option without a value. Raises ConfigError for a value that would end the line of a script.
    """
    quoted = []
    for name, value in options.items():
        if value is True:
            quoted.append(f"--{name}")
        elif value is not None:
            quoted.append(f"--{name}={shlex.quote(checked_line(str(value), f'launcher.{name}'))}")
    return quoted


def unquoted_options(options: OptionValues) -> list[str]:
    """The options that are set as arguments of a command that no shell reads: {"comment": "a b"} -> ["--comment=a b"].

    Raises ConfigError for a value with line breaks or control characters.
    """
    return [shlex.split(option)[0] for option in quoted_options(options)]


def default_job_name(runs: list[str]) -> str:
    """Name a job in SLURM's queue and its log files after its run: letters, digits, `_`, `.` and `-` only.

    ["runs/first"] -> "first"; ["sweeps/lr/0"] -> "lr-0"; several runs -> "shardtune".
    """
    if len(runs) > 1:
        return "shardtune"
    run = Path(runs[0])
    name = run.name
    if name.isdecimal() and run.parent.name:  # the runs of a sweep are called 0, 1, ...
        name = f"{run.parent.name}-{name}"
    return re.sub(r"[^\w.-]", "-", name) or "shardtune"


def checked_line(text: str, setting: str) -> str:
    """Return `text` if it fits into one line of a job script; raise ConfigError for line breaks and control characters.

    `setting`: where the text comes from, such as "launcher.setup", for the message.
    """
    if any(ord(character) < 32 for character in text):
        raise ConfigError(f"{setting} is {text!r}: a job script cannot carry line breaks or control characters in it")
    return text


def _checked_path(path: Path | str, setting: str) -> str:
    """Return a path as text if a job script and SLURM's file names can carry it.

    Raises ConfigError for line breaks, control characters, and a backslash, which switches patterns off in SLURM's file names.
    """
    if "\\" in str(path):
        raise ConfigError(
            f"{setting} is {str(path)!r}: SLURM's file names cannot carry a backslash; choose another path"
        )
    return checked_line(str(path), setting)
