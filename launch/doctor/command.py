"""`shardtune doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from launch.config.help_text import show_help
from launch.config.process_role import is_rank_process
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    read_arguments,
)
from launch.output import TableColumn, TableRow, format_table, print_json, wrap_sentences
from strategies import exit_codes
from strategies.errors import ConfigError
from strategies.extras import install_command


@dataclass(kw_only=True)
class DoctorArguments(VerbArguments):
    """What `shardtune doctor` takes."""

    settings: list[str] = forwarded_settings()
    verify: bool = flag("compare a run with these settings with one process, on a small copy of its model")
    as_json: bool = flag("print the findings as JSON, for a script", key="--json")


USAGE = f"""usage: shardtune doctor [--json]
       shardtune doctor launcher=slurm launcher.nodes=2 <settings of a run> [--json]
       shardtune doctor --verify <settings of a run> [--json]

  shardtune doctor
  shardtune doctor launcher.processes=2 model.path=models/llama
  shardtune doctor launcher=slurm launcher.nodes=2 launcher.gpus_per_node=8 run.dir=runs/first model.path=models/llama
  shardtune doctor --verify model.path=models/llama strategy=zero3 tuning=lora objective=dpo

Without settings, doctor checks this machine and changes nothing. It shows Python, the packages and the missing
extras, cores and memory, the GPUs as torch and their driver see them, caches and free space, SLURM, and the
environment variables that change a run.

With settings, doctor checks the nodes of that run (preflight, docs/torchrun-and-slurm.md). Each node says which code,
Python and libraries it has, and whether it can read the run directory, the model, the data and its GPUs. Then all
ranks exchange data, and a node that differs is named. With launcher=slurm, doctor asks SLURM for nodes unless it
already runs in an allocation. Without it, doctor checks this host.

With --verify, doctor takes one step of the run on a small copy of its model, on the fewest processes that show a
fault of its strategy, and compares loss and gradients with those of one process (docs/verify.md). It reads the
model's config.json, and neither weights nor data.

{help_rows(DoctorArguments)}

exit codes: 0 a run can start, 69 something prevents it, or --verify found a difference"""


def main(argv: list[str]) -> int:
    """Run `shardtune doctor` with the arguments `argv`; returns the exit code. Raises ConfigError for arguments it cannot use.

    - started by `doctor --verify` as one of its ranks: take the steps of that rank;
    - --verify: compare a small copy of the run on several ranks with one process;
    - settings, such as launcher=slurm: check the nodes that they describe;
    - neither: examine this machine.
    """
    is_rank_of_verification = "SHARDTUNE_CONFIG" in os.environ and is_rank_process(os.environ)
    if is_rank_of_verification:
        from launch.doctor import verify_rank

        return verify_rank.main()
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments, problems = read_arguments("doctor", DoctorArguments, argv)
    if problems:
        raise ConfigError(problems)
    if arguments.verify:
        from launch.doctor.verify import verify

        return verify(arguments.settings, as_json=arguments.as_json)
    if arguments.settings:
        return preflight(arguments.settings, arguments.as_json)
    from launch.doctor.machine import examine

    machine = examine(os.environ)
    if arguments.as_json:
        print_json({**machine.facts, "problems": machine.problems, "notes": machine.notes})
    else:
        print("\n".join(machine_report_lines(machine.facts, machine.problems, machine.notes)))
    return exit_codes.CHECK_FAILED if machine.problems else 0


def preflight(overrides: list[str], as_json: bool) -> int:
    """Check the nodes that a run's settings describe, before it runs there, and print the result; returns 0, or 69 for problems.

    Raises ConfigError for launcher settings that are wrong, StorageError if the run directory cannot be written.
    """
    from launch.cluster.preflight.answer import preflight_json, report_text
    from launch.cluster.preflight.coordinator import run_preflight
    from launch.cluster.preflight.targets import preflight_targets

    targets = preflight_targets(overrides)
    request = targets.request
    reports, verdict = run_preflight(request, targets.commands, targets.hosts, is_queued=targets.is_queued)
    if as_json:
        print_json(preflight_json(request, reports, verdict))
    else:
        print(report_text(request, reports, verdict))
    return exit_codes.CHECK_FAILED if verdict.problems else 0


def machine_report_lines(facts: dict[str, Any], problems: list[str], notes: list[str]) -> list[str]:
    """Write what doctor found on this machine as lines for people: a table of facts, then notes, then problems.

    `facts`: those of `launch.doctor.machine.Machine`, as `doctor --json` prints them.
    """
    rows = [*_package_rows(facts), *_hardware_rows(facts), *_environment_rows(facts)]
    lines = format_table((TableColumn(), TableColumn()), [TableRow(row) for row in rows])
    for title, sentences in (("notes", notes), ("problems", problems)):
        if sentences:
            lines += ["", f"{title}:", *wrap_sentences(sentences)]
    if not problems:
        lines += ["", "a run can start here"]
    return lines


def _package_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the host, Python, the packages and the extras; the last two only if shardtune is installed.

    Extras: each has what it `brings`, such as "FlashAttention", and what it `lacks`, as messages.
    """
    rows = [("host", f"{facts['host']}, {facts['system']}"), ("python", facts["python"])]
    if "packages" not in facts:
        return rows
    versions = [f"{name} {version or '(missing)'}" for name, version in facts["packages"].items()]
    rows += [("shardtune", facts["shardtune"]), ("packages", ", ".join(versions))]
    for extra, extra_facts in facts["extras"].items():
        availability = "here"
        if extra_facts["lacks"]:
            availability = f"{'; '.join(extra_facts['lacks'])} ({install_command(extra)})"
        rows.append((f"[{extra}]", f"{extra_facts['brings']}: {availability}"))
    return rows


def _hardware_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of cores, memory and GPUs; empty if torch could not be imported."""
    if "cores" not in facts:
        return []
    memory = f"{facts['memory_gib']:.1f} GiB, {facts['memory_free_gib']:.1f} GiB free"
    return [("cores", str(facts["cores"])), ("memory", memory), *_gpu_rows(facts)]


def _environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the directories that runs use, SLURM, and variables that keep libraries offline.

    facts["places"]: {"cache": {"path": "/home/me/.cache/shardtune", "free_gib": 120.0, "exists": True}, ...}.
    """
    rows = []
    for name, directory in facts["places"].items():
        models = f", {facts['models']} models" if name == "models" else ""  # how many the cache of the hub has
        missing = "" if directory["exists"] else ", not made yet"
        rows.append((name, f"{directory['path']}: {directory['free_gib']:.1f} GiB free{models}{missing}"))
    rows.append(("slurm", "yes" if facts["slurm"] else "no"))
    if facts["offline"]:
        arguments = [f"{variable}={setting}" for variable, setting in facts["offline"].items()]
        rows.append(("offline", ", ".join(arguments)))
    return rows


def _gpu_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the report's rows on CUDA and each GPU: ("gpu 0", "NVIDIA L4, 22.0 GiB, 21.7 GiB free"); one row without GPUs."""
    if not facts["gpus"]:
        return [("gpus", f"none; precision=auto is {facts['precision']}")]
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    rows = [("cuda", f"{facts['torch_cuda']}{driver}; precision=auto is {facts['precision']}")]
    for number, gpu in enumerate(facts["gpus"]):
        rows.append((f"gpu {number}", f"{gpu['name']}, {gpu['memory_gib']:.1f} GiB, {gpu['free_gib']:.1f} GiB free"))
    return rows
