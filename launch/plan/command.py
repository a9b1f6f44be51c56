"""`shardtune plan`: memory, time and price of a run before it starts, on a GPU that need not be here."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
    read_setting_group,
)
from launch.output import print_json
from launch.plan.cards import SHIPPED_CARD_NAMES, card_problems, read_card
from launch.plan.progress import PlanProgress
from strategies import exit_codes
from strategies.errors import ConfigError
from strategies.imports import importing_without_gc

if TYPE_CHECKING:
    from launch.plan.from_run import CalibratedCard
    from trainer.config.run import RunConfig
    from trainer.planner.hardware import Card
    from trainer.planner.sweep import PlanAnswer
    from trainer.planner.variants import PlanConfig, RunVariants


MULTIRUN_FLAGS = ("-m", "--multirun")
ADVICE_ON_SEVERAL_VALUES = (
    "plan is of one run; it compares all strategies if you leave strategy out; for several values of a setting, "
    "run it once for each"
)
STAND_IN_CARD = "h100_80g"
"""The card for which the settings of a run are checked if another argument is wrong, such as `hardware=`. It has bf16."""


@dataclass(kw_only=True)
class PlanArguments(VerbArguments):
    """What `shardtune plan` takes."""

    hardware: str = option(
        f"the card, or a YAML file like those of conf/hardware/: {', '.join(SHIPPED_CARD_NAMES)}",
        example="<card>",
        advice_if_missing=f"give the card to plan for, one of {', '.join(SHIPPED_CARD_NAMES)}",
    )
    measured_run: str | None = option(
        "use what that run measured on this card: step time, memory, checkpoints", key="from", example="runs/first"
    )
    to: Path | None = option("also write plan.html, a page of the plan, into this directory", example="<directory>")
    settings: list[str] = forwarded_settings(forwards_unknown_flags=True)
    as_json: bool = flag("print the plan as JSON, for a script", key="--json")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The arguments of `shardtune plan`, sorted into those of the verb, of the card (GPU), of the planner and of the run."""

    arguments: PlanArguments
    card: Card
    settings: PlanConfig
    run_overrides: list[str]
    """The overrides of the run that is planned, as `train` would take them."""


HELP_BY_GROUP_SETTING = {
    "hardware.<key>=...": "change a figure of the card: hardware.price_per_hour=2.10, hardware.memory_gib=40",
    "launcher.nodes=4": "nodes; together with launcher.gpus_per_node they give the ranks; default: one card",
    "plan.offload=true": "also try to keep states in host memory",
    "plan.quantisation=[nf4]": "also try other ways to store a frozen base: none, nf4",
    "plan.exact=true": "simulate whole models, instead of two shallow ones for each",
    "plan.theirs=[pure_bf16]": "also show the memory of other trainers: stock_loss, fused_loss, fp32_head, pure_bf16",
    "plan.expert_imbalance=2": "load of the busiest rank over the mean, with parallel.experts",
    "plan.workers=0": "processes that simulate; 0 takes one per core",
}
USAGE = f"""usage: shardtune plan [--json] hardware=<card> [to=<directory>] [key=value ...]

  shardtune plan model.path=models/llama3-8b data.max_length=4096 hardware=h100_80g \\
      launcher.nodes=4 launcher.gpus_per_node=8
  shardtune plan model.path=... data.path=train.jsonl hardware=a10g strategy=fsdp2 tuning=lora budget.epochs=3

plan predicts the memory, time and price of a run without training. It takes the settings of `train`. A setting that you
type stays fixed. If you leave out strategy, strategy.activation_checkpointing or batch.micro, plan tries all their
values. From the model it needs only config.json. It reads data only if you set data.path.

{help_rows(PlanArguments, HELP_BY_GROUP_SETTING)}

The exit code is 69 if nothing fits. docs/planning.md explains the answer, and docs/evidence/plans.md says how far
plans are from measured runs."""


def main(argv: list[str]) -> int:
    """Run `shardtune plan` with the arguments `argv`; returns the exit code, 69 if nothing fits.

    Raises ConfigError for wrong arguments; DataError or StorageError if the data of the run cannot be prepared.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    request = read_plan_request(argv)
    from launch.plan.answer import plan_as_json, plan_text
    from launch.plan.job import prepare_planned_job
    from trainer.model.known_shapes import shape_instead_of_files, shape_note
    from trainer.planner.plan import with_imbalance
    from trainer.planner.sweep import plan_variants, with_further_variants, with_worst_imbalance
    from trainer.planner.variants import FURTHER_LONG_ROW_SETTINGS, list_long_row_variants

    progress = PlanProgress()
    progress.show_phase("reading the settings and the model's config.json")
    # First, because what is wrong with the settings must be reported before the data is prepared, which may take an hour.
    try:
        run = compose_planned_run(request.run_overrides, request.card)
        variants = _list_checked_variants(run, request.settings)
    except ConfigError as error:
        raise ConfigError(problems_of_planned_run(request.run_overrides, request.card, request.settings)) from error
    finally:
        progress.clear()
    config, fixed_keys = run
    shape = shape_instead_of_files(config.model)
    calibration = card_of_request(request, ["plan", *argv])
    job = with_imbalance(prepare_planned_job(config, calibration.card), request.settings, calibration.expert_imbalance)
    micro_batch = config.batch["micro"] if "batch.micro" in fixed_keys else None
    answer = plan_variants(variants, job, micro_batch, request.settings, progress.show)
    # If nothing fits, the reason is as a rule that rows are long. Then variants in which ranks share a row are tried.
    for long_row_settings in FURTHER_LONG_ROW_SETTINGS:
        if answer.fastest_fitting_choice is not None:
            break
        further = list_long_row_variants(config, request.settings, fixed_keys, job.world_size, long_row_settings)
        num_further = len(further.possible)
        if num_further:
            print(
                f"nothing fits: looking at {num_further} further options, with rows that ranks share", file=sys.stderr
            )
            answer = with_further_variants(answer, further, job, micro_batch, request.settings, progress.show)
    if answer.fastest_fitting_choice is None:
        answer = _with_enough_cards(answer, request.settings, fixed_keys, progress)
    answer = with_worst_imbalance(answer, request.settings)
    if shape is not None:
        notes = (shape_note(shape, config.model.path), *answer.cost_model.notes)
        answer = replace(answer, cost_model=replace(answer.cost_model, notes=notes))
    if request.arguments.as_json:
        print_json(plan_as_json(answer, request.run_overrides, calibration.lines))
    else:
        print(plan_text(answer, request.run_overrides, calibration.lines), flush=True)
    if request.arguments.to is not None:
        from launch.plan.page import PAGE_FILE, plan_page
        from trainer.reporting.status import write_text_atomic

        page_file = request.arguments.to.expanduser() / PAGE_FILE
        write_text_atomic(page_file, plan_page(answer, request.run_overrides, calibration.lines))
        print(f"written: {page_file}", file=sys.stderr if request.arguments.as_json else sys.stdout, flush=True)
    return 0 if answer.fastest_fitting_choice is not None else exit_codes.CHECK_FAILED


def _with_enough_cards(
    answer: PlanAnswer, settings: PlanConfig, fixed_keys: set[str], progress: PlanProgress
) -> PlanAnswer:
    """`answer`, in which nothing fits, with a number of cards that would do, if one is found.

    `fixed_keys`: settings on the command line. A node keeps its number of cards if one of them sets it.
    """
    from trainer.planner.more_cards import SHARDING_STRATEGIES, find_enough_cards

    if not any(choice.variant.name in SHARDING_STRATEGIES for choice in answer.best_choices):
        return answer
    job = answer.planned_run
    sets_cards_of_node = fixed_keys & {"launcher.gpus_per_node", "launcher.processes"}
    max_ranks_per_node = job.ranks_per_node if sets_cards_of_node else job.card.gpus_per_node
    print("nothing fits: looking for a number of cards that would do", file=sys.stderr, flush=True)
    enough_cards = find_enough_cards(answer, settings, progress.show, max_ranks_per_node=max_ranks_per_node)
    return replace(answer, enough_cards=enough_cards)


def card_of_request(request: PlanRequest, command: list[str]) -> CalibratedCard:
    """Settle the figures of the GPU ("card") to plan for: those that the run of `from=` measured, else those of the card's file.

    That run is simulated, which takes a while. `from.<setting>=<value>` is a permission: it allows a value with which the run
    reads something outside of its directory, as in `from=runs/first from.model.trust_remote_code=true`. `command`: the command
    line, for messages. Raises ConfigError for another `from.` argument, and for a permission without a run (`from=`).
    """
    from launch.config.read_run import split_allowing_arguments
    from launch.plan.from_run import PERMISSION_PREFIX, CalibratedCard, calibrate_card

    run_dir = request.arguments.measured_run
    from_arguments = [setting for setting in request.arguments.settings if setting.startswith(PERMISSION_PREFIX)]
    permissions, unknown_arguments = split_allowing_arguments(from_arguments, PERMISSION_PREFIX)
    if unknown_arguments:
        raise ConfigError(f"{unknown_arguments[0]}: allows nothing; from.* takes what the run of from= reaches out to")
    if run_dir is None:
        if permissions:
            raise ConfigError(
                f"{PERMISSION_PREFIX}{permissions[0]}: there is no run that it allows something; name one with from="
            )
        return CalibratedCard(request.card)
    print(f"simulating {run_dir} as it ran", file=sys.stderr, flush=True)
    return calibrate_card(request.card, run_dir, request.settings, permissions, command)


def read_plan_request(argv: list[str]) -> PlanRequest:
    """Read the command line of `shardtune plan`, and the file of the GPU ("card") that `hardware=` names.

    `hardware.*` changes figures of the card, `plan.*` are settings of the planner, and the rest are overrides of the run.
    Raises ConfigError with every problem at once.
    """
    from launch.plan.from_run import PERMISSION_PREFIX
    from trainer.planner.hardware import Card
    from trainer.planner.variants import PlanConfig

    arguments, problems = read_arguments("plan", PlanArguments, argv)
    card_of_file = Card()
    if arguments.hardware is not None:
        try:
            card_of_file = read_card(arguments.hardware)
        except ConfigError as error:
            problems += error.problems
    card, other_arguments, hardware_problems = read_setting_group("hardware", card_of_file, arguments.settings)
    settings, run_arguments, plan_problems = read_setting_group("plan", PlanConfig(), other_arguments)
    problems += hardware_problems + plan_problems + _plan_setting_problems(settings)
    # Only without other problems, because a card whose file could not be read lacks every figure.
    problems = problems or card_problems(card)
    multirun_flags = [argument for argument in run_arguments if argument in MULTIRUN_FLAGS]
    problems += [f"{argument}: {ADVICE_ON_SEVERAL_VALUES}" for argument in multirun_flags]
    # Permissions for the run of `from=` are read by `card_of_request`, and are no settings of the planned run.
    run_overrides = []
    for argument in run_arguments:
        if argument not in multirun_flags and not argument.startswith(PERMISSION_PREFIX):
            run_overrides.append(argument)
    if problems:
        raise ConfigError([*problems, *problems_of_planned_run(run_overrides, read_card(STAND_IN_CARD), settings)])
    return PlanRequest(arguments, card, settings, run_overrides)


def problems_of_planned_run(overrides: list[str], card: Card, settings: PlanConfig) -> list[str]:
    """Every problem of the run to plan, so that the user sees all at once; empty if it can be planned.

    An override that cannot be used, such as `tunning=lora`, keeps the run from being composed. The others are then checked
    without it.
    """
    from launch.config.compose import repeats_problem_of_override
    from launch.config.overrides import parse_overrides

    try:
        run = compose_planned_run(overrides, card)
    except ConfigError as error:
        composition_problems = [_without_multirun_advice(problem) for problem in error.problems]
        usable_overrides = []
        for override in overrides:
            if not any(problem.startswith(f"{override}: ") for problem in error.problems):
                usable_overrides.append(override)
        if len(usable_overrides) == len(overrides):
            return composition_problems
        # What the unusable overrides were meant to set is not set now: that is no further problem.
        meant_keys = parse_overrides(overrides).probably_meant_keys
        further_problems = problems_of_planned_run(usable_overrides, card, settings)
        return [
            *composition_problems,
            *(problem for problem in further_problems if not repeats_problem_of_override(problem, meant_keys)),
        ]
    try:
        _list_checked_variants(run, settings)
    except ConfigError as error:
        return error.problems
    return []


def _without_multirun_advice(problem: str) -> str:
    """The message about an override with several values, which advises `-m`, in words for `plan`, which takes no `-m`."""
    from launch.config.overrides import SEARCH_ADVICE, SWEEP_ADVICE

    for advice in (SWEEP_ADVICE, SEARCH_ADVICE):
        problem = problem.replace(advice, ADVICE_ON_SEVERAL_VALUES)
    return problem


def _list_checked_variants(run: RunToPlan, settings: PlanConfig) -> RunVariants:
    """The variants of the run that the plan compares. Raises ConfigError if none can be planned, or the model cannot be read."""
    from launch.config.compose import num_launched_ranks
    from trainer.model.loading import load_model_config
    from trainer.planner.variants import list_variants

    variants = list_variants(run.config, settings, run.fixed_keys, num_launched_ranks(run.config))
    load_model_config(run.config.model)
    return variants


def _plan_setting_problems(settings: PlanConfig) -> list[str]:
    """Check the planner's own settings (`plan.*`) against their ranges; returns error messages."""
    problems = []
    if settings.workers < 0:
        problems.append(f"plan.workers={settings.workers}: must be at least 0; 0 takes one a core")
    if settings.expert_imbalance is not None and settings.expert_imbalance < 1:
        problems.append(
            f"plan.expert_imbalance={settings.expert_imbalance:g}: must be at least 1, where all ranks get as many rows; 2 is "
            "assumed without it"
        )
    return problems


class RunToPlan(NamedTuple):
    """The run that a plan is asked for."""

    config: RunConfig
    """Its configuration, for GPUs that need not be here. Its settings are not validated yet."""
    fixed_keys: set[str]
    """Keys and groups that the command line sets, except to `auto`: the plan must not change them.

    ["strategy=fsdp2", "data.max_length=4096", "batch.micro=auto"] -> {"strategy", "data.max_length"}."""


def compose_planned_run(overrides: list[str], card: Card) -> RunToPlan:
    """Compose the configuration of the run to plan, for GPUs that need not be in this machine.

    If they are not set, `batch.micro` becomes 1, and `batch.global` is rounded up to a multiple that the ranks can share. The
    settings are not validated here: `trainer.planner.variants.list_variants` does that for each option. Raises ConfigError for
    overrides that cannot be used.
    """
    with importing_without_gc("torch"):
        from launch.config.compose import compose_config
        from strategies.base import Precision
        from trainer.config.run import Device

    fixed_keys = _keys_fixed_by_overrides(overrides)
    # The default is SLURM's launcher, because it takes nothing from this machine and has gpus_per_node.
    default_launcher = [] if "launcher" in fixed_keys else ["launcher=slurm"]
    config = compose_config([*overrides, *default_launcher], check=False).config
    if "launcher.gpus_per_node" in fixed_keys and getattr(config.launcher, "gpus_per_node", 1) == 0:
        raise ConfigError("launcher.gpus_per_node=0: asks for nodes without GPUs; give the cards of a node to plan for")
    config.run.device = Device.cuda
    if config.optim.lr is None:
        config.optim.lr = 1.0  # no usual rate is known, and a plan does not depend on it
    # launcher=local has resolved `auto` for this machine, but the plan is for another one.
    precision = Precision.auto if "precision" in config.substitutions else config.precision
    config = replace(config, precision=card.precision(precision))
    _fill_batch(config.batch, config, fixed_keys)
    return RunToPlan(config, fixed_keys)


def _keys_fixed_by_overrides(overrides: list[str]) -> set[str]:
    """Keys and groups that `overrides` set, except to `auto`, which the plan replaces by all values that it could become."""
    from launch.config.overrides import parse_overrides
    from trainer.config.run import AUTO, MICRO_BATCH_KEY, STRATEGY_KEY

    parsed = parse_overrides(overrides)
    groups = {group for group, choice in parsed.choices.items() if (group, choice) != (STRATEGY_KEY, AUTO)}
    keys = {setting.key for setting in parsed.values if (setting.key, setting.value) != (MICRO_BATCH_KEY, AUTO)}
    return groups | keys


def _fill_batch(batch: dict[str, Any], config: RunConfig, fixed_keys: set[str]) -> None:
    """Give `batch` values with which a plan can work, where the command line sets none; changes it in place.

    `micro` becomes 1 (the plan tries others later), and `global` is rounded up to a multiple that the ranks can share.
    `config`: the run, for its ranks. `fixed_keys`: settings on the command line, which stay.
    """
    from launch.config.compose import num_launched_ranks
    from trainer.config.parallel import dp_size_of
    from trainer.config.run import MICRO_BATCH_KEY

    if MICRO_BATCH_KEY not in fixed_keys:
        batch["micro"] = 1
    smallest_batch = batch["micro"] * dp_size_of(config, num_launched_ranks(config) or 0)
    if "batch.global" not in fixed_keys and smallest_batch > 0:
        accumulation_steps = math.ceil(batch["global"] / smallest_batch)
        batch["global"] = accumulation_steps * smallest_batch
