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

    Sets up expert parallelism in the plan of `built.step_module`; if groups of experts cross hosts, `built.substitutions`
    gets a note. Raises ConfigError for experts that cannot be divided.
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
    # HSDP has several replicas of the model: weights are sharded over the ranks of one.
    ranks_per_replica = world_size // replica_count(config.strategy, world_size, nodes)
    return expert_parallelism_lines(built, precision, ranks_per_replica)


def imbalance_notes(job: PlannedJob, expert_parallel_degrees: set[int]) -> list[str]:
    """Say how unevenly a plan assumes that tokens are spread over experts: how many times the mean the busiest rank gets.

    `expert_parallel_degrees`: the values of `parallel.experts` (ranks in a group) in the plan. Without `from=` there is one
    note. With it, there is one on the degree that the run has measured, and one each on smaller and larger degrees, if there
    are any.
    """
    assumption = (
        f"the busiest rank is assumed to get {job.expert_imbalance:.3g} times the mean of tokens in every layer"
    )
    measured_degree = job.imbalance_measured_over
    if measured_degree is None:
        return [f"with parallel.experts, {assumption} (plan.expert_imbalance)"]
    notes = [f"with parallel.experts={measured_degree}, {assumption}, as the run of from= measured"]
    smaller_degrees = sorted(degree for degree in expert_parallel_degrees if degree < measured_degree)
    if smaller_degrees:
        degrees_text = " and ".join(map(str, smaller_degrees))
        notes.append(f"with {degrees_text}, which the run did not measure, the same: its groups can only be more even")
    larger_degrees = sorted(degree for degree in expert_parallel_degrees if degree > measured_degree)
    if larger_degrees:
        # `imbalance_over` assumes the same of all degrees above the measured one, so the first stands for all.
        degrees_text = " and ".join(map(str, larger_degrees))
        notes.append(
            f"with {degrees_text}, which the run did not measure, {job.imbalance_over(larger_degrees[0]):.3g} times the mean: "
            "fewer experts a rank are less even (plan.expert_imbalance)"
        )
    return notes


def _cross_host_notes(job: PlannedJob, expert_parallel_degrees: set[int]) -> list[str]:
    """Warn of groups of ranks that share experts and lie on several hosts, where sending tokens is slow: a note for each size.

    `expert_parallel_degrees`: sizes of groups (`parallel.experts`) in the plan.
    """
    notes = []
    for degree in sorted(expert_parallel_degrees):
        note = expert_groups_across_hosts_note(degree, job.ranks_per_node, job.num_nodes)
        if note is not None:
            notes.append(f"parallel.experts={degree}: {note}")
    return notes


def expert_parallel_notes(answer: PlanAnswer) -> list[str]:
    """Say what a plan's reader should know of expert parallelism (a layer's experts are distributed over ranks).

    Empty if no option of the plan uses it (`parallel.experts` above 1):

    - whether the fastest choice with it is faster than the fastest without, which gathers all experts of a layer on each rank;
    - which of its groups cross hosts;
    - how unevenly tokens are assumed to be spread over experts;
    - whether the choice would still fit if one rank got all tokens.
    """
    expert_parallel_choices = [choice for choice in answer.best_choices if choice.variant.config.parallel.experts > 1]
    if not expert_parallel_choices:
        return []
    degrees = {choice.variant.config.parallel.experts for choice in expert_parallel_choices}
    return [
        *_comparison_notes(answer),
        *_cross_host_notes(answer.planned_run, degrees),
        *imbalance_notes(answer.planned_run, degrees),
        *_worst_imbalance_notes(answer),
    ]


def _comparison_notes(answer: PlanAnswer) -> list[str]:
    """Say whether expert parallelism pays: the fastest option with it beside the fastest that gathers all experts on each rank.

    No note if the former does not fit, or if the plan has none of the latter.
    """
    # `best_choices` begins with the fastest.
    fastest = next(choice for choice in answer.best_choices if choice.variant.config.parallel.experts > 1)
    gathering = next((choice for choice in answer.best_choices if choice.variant.config.parallel.experts == 1), None)
    if gathering is None or not fastest.fits:
        return []
    override = f"parallel.experts={fastest.variant.config.parallel.experts}"
    if not gathering.fits:
        return [f"{override} fits, and nothing does that gathers all experts of a layer on each rank"]
    relative_speed = fastest.tokens_per_s / gathering.tokens_per_s
    comparison = f"{relative_speed:.2f} times as fast as"
    if relative_speed < 1:
        comparison = f"slower, {relative_speed:.2f} times the speed of"
    return [f"{override} is {comparison} the fastest option that gathers all experts of a layer on each rank"]


def _worst_imbalance_notes(answer: PlanAnswer) -> list[str]:
    """Say whether the plan's first option would still fit in the worst case, where the experts of one rank get all tokens.

    No note if that was not simulated, because the option distributes no experts, or could not be.
    """
    worst = answer.worst_imbalance_fit
    if worst is None:
        return []
    verdict = "fits" if worst.margin_bytes >= 0 else f"is {-worst.margin_bytes / GIB:.1f} GiB too much"
    return [f"if one rank got all tokens, this option would take {worst.needed_bytes / GIB:.1f} GiB, which {verdict}"]
