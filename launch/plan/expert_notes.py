"""What a plan and `--dry-run` say of expert parallelism (`parallel.experts`): whether it pays, and what is assumed of it."""

from __future__ import annotations

import torch

from strategies.base import Precision
from strategies.mesh import replica_count
from strategies.runtime import Runtime
from trainer.build.experts import expert_groups_across_hosts_note, expert_parallelism_lines, plan_expert_parallelism
from trainer.config.run import RunConfig
from trainer.planner.hardware import GIB
from trainer.planner.plan import PlannedJob
from trainer.planner.sweep import PlanAnswer
from trainer.step import BuiltModel


def expert_lines_of_dry_run(config: RunConfig, built: BuiltModel, world_size: int) -> list[str]:
    """The lines of the start screen about expert parallelism, for `built` on meta and `world_size` ranks; none without it.

    If groups of experts cross hosts, `built.substitutions` gets a note. Raises ConfigError for experts that cannot be divided.
    """
    if config.parallel.experts == 1:
        return []
    nodes = config.launcher.nodes
    runtime = Runtime(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=world_size // nodes,
        device=torch.device("cpu"),
        control_group=None,
    )
    plan_expert_parallelism(built, config, runtime)
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if str(config.run.device) == "cuda" else Precision.fp32
    return expert_parallelism_lines(built, precision, world_size // replica_count(config.strategy, world_size, nodes))


def imbalance_notes(job: PlannedJob, degrees: set[int]) -> list[str]:
    """Notes on how many tokens the plan assumes for the busiest rank of an expert group.

    `degrees`: the values of `parallel.experts` (ranks in a group) in the plan. Without `from=` there is one note. With it,
    there is one on the degree that the run has measured, and one each on smaller and larger degrees, if the plan has any.
    """
    assumption = (
        f"the busiest rank is assumed to get {job.expert_imbalance:.3g} times the mean of tokens in every layer"
    )
    measured_degree = job.imbalance_measured_over
    if measured_degree is None:
        return [f"with parallel.experts, {assumption} (plan.expert_imbalance)"]
    notes = [f"with parallel.experts={measured_degree}, {assumption}, as the run of from= measured"]
    smaller_degrees = sorted(degree for degree in degrees if degree < measured_degree)
    if smaller_degrees:
        degrees_text = " and ".join(map(str, smaller_degrees))
        notes.append(f"with {degrees_text}, which the run did not measure, the same: its groups can only be more even")
    larger_degrees = sorted(degree for degree in degrees if degree > measured_degree)
    if larger_degrees:
        degrees_text = " and ".join(map(str, larger_degrees))
        notes.append(
            f"with {degrees_text}, which the run did not measure, {job.imbalance_over(larger_degrees[0]):.3g} times the mean: "
            "fewer experts a rank are less even (plan.expert_imbalance)"
        )
    return notes


def _cross_host_notes(job: PlannedJob, degrees: set[int]) -> list[str]:
    """A note for each expert group size in `degrees` (`parallel.experts`) whose groups do not lie within hosts."""
    notes = []
    for degree in sorted(degrees):
        note = expert_groups_across_hosts_note(degree, job.ranks_per_node, job.num_nodes)
        if note is not None:
            notes.append(f"parallel.experts={degree}: {note}")
    return notes


def expert_parallel_notes(answer: PlanAnswer) -> list[str]:
    """Notes on expert parallelism (`parallel.experts`), for the text and the page of a plan; empty if no choice uses it.

    - whether the fastest choice with it is faster than the fastest without, which gathers all experts of a layer on each rank;
    - which of its groups cross hosts;
    - how unevenly tokens are assumed to be spread over experts;
    - whether the choice would still fit if one rank got all tokens.
    """
    expert_parallel_choices = [choice for choice in answer.best_choices if choice.variant.config.parallel.experts > 1]
    gathering_choices = [choice for choice in answer.best_choices if choice.variant.config.parallel.experts == 1]
    if not expert_parallel_choices:
        return []
    notes = []
    fastest = expert_parallel_choices[0]  # both lists begin with the fastest choice
    override = f"parallel.experts={fastest.variant.config.parallel.experts}"
    if gathering_choices and fastest.fits and gathering_choices[0].fits:
        relative_speed = fastest.tokens_per_s / gathering_choices[0].tokens_per_s
        comparison = f"{relative_speed:.2f} times as fast as"
        if relative_speed < 1:
            comparison = f"slower, {relative_speed:.2f} times the speed of"
        notes.append(f"{override} is {comparison} the fastest option that gathers all experts of a layer on each rank")
    elif gathering_choices and fastest.fits:
        notes.append(f"{override} fits, and nothing does that gathers all experts of a layer on each rank")
    degrees = {choice.variant.config.parallel.experts for choice in expert_parallel_choices}
    notes += _cross_host_notes(answer.planned_run, degrees)
    notes += imbalance_notes(answer.planned_run, degrees)
    if answer.worst_imbalance_fit is not None:
        worst = answer.worst_imbalance_fit
        verdict = "fits" if worst.margin_bytes >= 0 else f"is {-worst.margin_bytes / GIB:.1f} GiB too much"
        notes.append(
            f"if one rank got all tokens, this option would take {worst.needed_bytes / GIB:.1f} GiB, which {verdict}"
        )
    return notes
