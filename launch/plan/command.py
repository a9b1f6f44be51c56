"""`shardtune plan`: memory, time and price of a run before it starts, on a GPU that need not be here."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.choices import CONF_DIR
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
from launch.streams import draw
from strategies.errors import ConfigError
from strategies.imports import importing

if TYPE_CHECKING:
    from launch.plan.from_run import Calibrated
    from trainer.config.run import RunConfig
    from trainer.planner.hardware import Card
    from trainer.planner.plan import PlanConfig

CARDS = sorted(file.stem for file in (CONF_DIR / "hardware").glob("*.yaml"))


@dataclass(kw_only=True)
class PlanArguments(VerbArguments):
    """What `shardtune plan` takes."""

    hardware: str = option(
        f"the card, or a YAML file like those of conf/hardware/: {', '.join(CARDS)}",
        example="<card>",
        advice_if_missing=f"give the card to plan for, one of {', '.join(CARDS)}",
    )
    measured: str | None = option(
        "use what that run measured on this card: step time, memory, checkpoints", key="from", example="runs/first"
    )
    to: Path | None = option("also write plan.html, a page of the plan, into this directory", example="<directory>")
    settings: list[str] = forwarded_settings(unknown_flags=True)
    as_json: bool = flag("print the plan as JSON, for a script", key="--json")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The arguments of `shardtune plan`, sorted into those of the card, of the plan and of the run."""

    arguments: PlanArguments
    card: Card
    settings: PlanConfig
    of_run: list[str]
    """The arguments of the run that is planned, as `train` would take them."""


OF_GROUPS = {
    "hardware.<key>=...": "change a figure of the card: hardware.price_per_hour=2.10, hardware.memory_gib=40",
    "launcher.nodes=4": "nodes; together with launcher.gpus_per_node they give the ranks; default: one card",
    "plan.offload=true": "also try to keep states in host memory",
    "plan.quantisation=[nf4]": "also try other ways to store a frozen base: none, nf4",
    "plan.exact=true": "simulate whole models, instead of two shallow ones for each",
    "plan.theirs=[pure_bf16]": "also show what other trainers would hold: stock_loss, fused_loss, fp32_head, pure_bf16",
    "plan.expert_imbalance=2": "rows of the busiest rank over the mean, where parallel.experts deals experts over ranks",
    "plan.workers=0": "processes that simulate; 0 takes one per core",
}
USAGE = f"""usage: shardtune plan [--json] hardware=<card> [to=<directory>] [key=value ...]

  shardtune plan model.path=models/llama3-8b data.max_length=4096 hardware=h100_80g \\
      launcher.nodes=4 launcher.gpus_per_node=8
  shardtune plan model.path=... data.path=train.jsonl hardware=a10g strategy=fsdp2 tuning=lora budget.epochs=3

plan predicts the memory, time and price of a run without training. It takes the words of `train`. A setting that you
type stays fixed. If you leave out strategy, strategy.activation_checkpointing or batch.micro, plan tries all their
values. From the model it needs only config.json. It reads data only if you set data.path.

{help_rows(PlanArguments, OF_GROUPS)}

The exit code is 69 if nothing fits. docs/planning.md explains the answer, and docs/evidence/plans.md says how far
plans are from measured runs."""


def main(argv: list[str]) -> int:
    """Run `shardtune plan` with the arguments typed after it; returns the exit code, 69 if nothing fits.

    Errors: ConfigError, DataError, StorageError.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    request = read_plan(argv)
    from launch.config.compose import launched_ranks
    from launch.plan.answer import as_dict, text
    from launch.plan.job import job_of
    from trainer.model.known_shapes import shape_in_use, shape_note
    from trainer.model.loading import load_model_config
    from trainer.planner.plan import FURTHER_SETTINGS, further_variants, run_variants, with_imbalance
    from trainer.planner.sweep import plan_variants, with_further, with_worst_imbalance

    config, typed = composed(request.of_run, request.card)
    # Whatever can be known to be wrong is reported before the data is prepared, which may take an hour.
    variants, refused = run_variants(config, request.settings, typed, launched_ranks(config))
    load_model_config(config.model)
    shape = shape_in_use(config.model)
    measured = measured_by(request, ["plan", *argv])
    job = with_imbalance(job_of(config, measured.card), request.settings, measured.expert_imbalance)
    micro = config.batch["micro"] if "batch.micro" in typed else None
    answer = plan_variants(variants, refused, job, micro, request.settings, _progress())
    # What nothing fits otherwise is long rows as a rule: then ranks may share them.
    for long_rows in FURTHER_SETTINGS:
        if answer.best is not None:
            break
        variants, refused = further_variants(config, request.settings, typed, job.ranks, long_rows)
        if variants:
            print(f"nothing fits: looking at {len(variants)} further ways, with rows that ranks share", file=sys.stderr)
            answer = with_further(answer, variants, refused, job, micro, request.settings, _progress())
    answer = with_worst_imbalance(answer, request.settings)
    if shape is not None:
        notes = (shape_note(shape, config.model.path), *answer.cost_model.notes)
        answer = replace(answer, cost_model=replace(answer.cost_model, notes=notes))
    if request.arguments.as_json:
        print_json(as_dict(answer, request.of_run, measured.lines))
    else:
        print(text(answer, request.of_run, measured.lines), flush=True)
    if request.arguments.to is not None:
        from launch.plan.page import PAGE_FILE, plan_page
        from trainer.reporting.status import write_text_atomic

        page = request.arguments.to.expanduser() / PAGE_FILE
        write_text_atomic(page, plan_page(answer, request.of_run, measured.lines))
        print(f"written: {page}", file=sys.stderr if request.arguments.as_json else sys.stdout, flush=True)
    return 0 if answer.best is not None else 69


def measured_by(request: PlanRequest, command: list[str]) -> Calibrated:
    """The card (GPU) with the figures that the run of `from=` measured; without `from=`, as its file says. Errors: ConfigError.

    With `from=`, that run is simulated, which takes a while. `command` is the command line, for messages.
    """
    from launch.config.read_run import split_allowing_arguments
    from launch.plan.from_run import ALLOWING, Calibrated, calibrated

    run_dir = request.arguments.measured
    allowing_arguments = [setting for setting in request.arguments.settings if setting.startswith(ALLOWING)]
    allowing, unknown = split_allowing_arguments(allowing_arguments, ALLOWING)
    if unknown:
        raise ConfigError(f"{unknown[0]}: allows nothing; from.* takes what the run of from= reaches out to")
    if run_dir is None:
        if allowing:
            raise ConfigError(f"{ALLOWING}{allowing[0]}: there is no run that it allows something; name one with from=")
        return Calibrated(request.card)
    print(f"simulating {run_dir} as it ran", file=sys.stderr, flush=True)
    return calibrated(request.card, run_dir, request.settings, allowing, command)


def read_plan(argv: list[str]) -> PlanRequest:
    """Read the command line of `shardtune plan`, and the file of the GPU that `hardware=` names ("card").

    The settings are taken in turn: hardware.* change the card, plan.* the planner, and the rest are the run's.
    Errors: ConfigError with every problem at once.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from launch.plan.from_run import ALLOWING
    from trainer.planner.hardware import Card
    from trainer.planner.plan import PlanConfig

    arguments, problems = read_arguments("plan", PlanArguments, argv)
    card_settings = OmegaConf.structured(Card)
    if arguments.hardware is not None:
        try:
            card_settings = OmegaConf.merge(card_settings, _load_card_file(_card_file(arguments.hardware)))
        except OSError as error:
            problems.append(f"hardware={arguments.hardware}: {str(error).splitlines()[0]}; one of {', '.join(CARDS)}")
        except (OmegaConfBaseException, ValueError, YAMLError) as error:
            # OmegaConf appends lines with the full key and type: the first sentence says it all.
            reason = " ".join(str(error).split("\n    full_key")[0].split())
            problems.append(f"hardware={arguments.hardware}: {reason}; write it as those of conf/hardware/ are")
    card_of_file = OmegaConf.to_object(card_settings)
    assert isinstance(card_of_file, Card)
    card, other_arguments, hardware_problems = read_setting_group("hardware", card_of_file, arguments.settings)
    settings, run_arguments, plan_problems = read_setting_group("plan", PlanConfig(), other_arguments)
    problems += hardware_problems + plan_problems
    if settings.workers < 0:
        problems.append(f"plan.workers={settings.workers}: must be at least 0; 0 takes one a core")
    if settings.expert_imbalance is not None and settings.expert_imbalance < 1:
        problems.append(
            f"plan.expert_imbalance={settings.expert_imbalance:g}: must be at least 1, where all ranks get as many rows; 2 is "
            "assumed without it"
        )
    # Only without other problems: a card whose file could not be read lacks every figure.
    problems = problems or _card_problems(card)
    if problems:
        raise ConfigError(problems)
    of_run = [argument for argument in run_arguments if not argument.startswith(ALLOWING)]
    return PlanRequest(arguments, card, settings, of_run)


def _card_file(name: str) -> Path:
    """The YAML file of a card: the path that was typed, or the file of that name in conf/hardware/. Errors: OSError."""
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
    else:
        file = CONF_DIR / "hardware" / f"{name}.yaml"
    if not file.is_file():
        raise OSError("there is no such card")
    return file


def _load_card_file(file: Path) -> Any:
    """The keys of a card's YAML file. Errors: ValueError if it holds something else, OSError, YAMLError."""
    from omegaconf import DictConfig, OmegaConf

    contents = OmegaConf.load(file)
    if not isinstance(contents, DictConfig):
        raise ValueError("the file must hold keys, as in memory_gib: 80")
    return contents


def _card_problems(card: Card) -> list[str]:
    """Error messages for figures of a card that are missing or impossible, without which nothing can be planned."""
    from strategies.base import Precision

    positive_figures = (
        "memory_gib",
        "fp32_tflops",
        "memory_gb_s",
        "link_gb_s",
        "node_gb_s",
        "host_gb_s",
        "disk_gb_s",
        "gpus_per_node",
        "pace",
        "writing_pace",
        "tensors",
    )
    problems = []
    for name in positive_figures:
        figure = getattr(card, name)
        if figure <= 0:
            problems.append(f"hardware.{name}={figure:g}: must be above 0")
    if card.scoring_s is not None and card.scoring_s < 0:
        problems.append(f"hardware.scoring_s={card.scoring_s:g}: must be at least 0; leave it out if it is not known")
    if card.allocator < 0:
        problems.append(f"hardware.allocator={card.allocator:g}: must be at least 0; 0.05 is the allowance")
    if len(card.capability) != 2:
        problems.append(f"hardware.capability={card.capability}: must be two numbers, such as [9,0]")
    elif not card.tflops(card.precision(Precision.auto)):
        problems.append(
            f"hardware.name={card.name}: its speed is not known; give the driver's name of a card in docs/speed.md"
        )
    return problems


def composed(arguments: list[str], card: Card) -> tuple[RunConfig, set[str]]:
    """(configuration of a run on GPUs that need not be here, the keys and groups that `arguments` set). Raises ConfigError.

    For ["strategy=fsdp2", "data.max_length=4096", "batch.micro=auto"], these are {"strategy", "data.max_length"}.
    If they are not set, `batch.micro` is 1 and `batch.global` the next multiple that the ranks can share. The settings
    are not validated here: `trainer.planner.plan.run_variants` does that for each way to run.
    """
    with importing("torch"):
        from launch.config.compose import compose, launched_ranks
        from launch.config.overrides import parse_overrides
        from strategies.base import Precision
        from trainer.config.parallel import readers_of
        from trainer.config.run import AUTO, MICRO_BATCH_KEY, STRATEGY_KEY, Device

    parsed = parse_overrides(arguments)
    # `auto` does not count as typed: the plan tries all values that it could become.
    typed = {group for group, choice in parsed.choices.items() if (group, choice) != (STRATEGY_KEY, AUTO)}
    typed |= {setting.key for setting in parsed.values if (setting.key, setting.value) != (MICRO_BATCH_KEY, AUTO)}
    # SLURM's launcher takes nothing from this machine, and knows gpus_per_node.
    default_launcher = [] if "launcher" in typed else ["launcher=slurm"]
    config = compose([*arguments, *default_launcher], check=False).config
    if "launcher.gpus_per_node" in typed and getattr(config.launcher, "gpus_per_node", 1) == 0:
        raise ConfigError("launcher.gpus_per_node=0: asks for nodes without GPUs; give the cards of a node to plan for")
    config.run.device = Device.cuda
    if config.optim.lr is None:
        config.optim.lr = 1.0  # no usual rate is known, and a plan does not depend on it
    # launcher=local resolves `auto` for this machine; the plan is for another one.
    precision = Precision.auto if "precision" in config.substitutions else config.precision
    config = replace(config, precision=card.precision(precision))
    if MICRO_BATCH_KEY not in typed:
        config.batch["micro"] = 1
    smallest_batch = config.batch["micro"] * readers_of(config, launched_ranks(config) or 0)
    if "batch.global" not in typed and smallest_batch > 0:
        # Rounded up to a multiple that all ranks can share.
        accumulation = -(-config.batch["global"] // smallest_batch)
        config.batch["global"] = accumulation * smallest_batch
    return config, typed


def _progress() -> Any:
    """Make a function that prints on stderr how many ways to run are simulated, from (done, total, name of the last one).

    In a terminal it writes over one line; in a log file it prints a single line at the end.
    """
    is_terminal = sys.stderr.isatty()

    def on_progress(done: int, total: int, variant: str) -> None:
        if is_terminal:
            draw(sys.stderr, "\r\033[K")
            line = f"simulated {done} of {total}: {variant}"[:96]  # a line that wraps could not be written over
            print(line, end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done == total:
            print(f"simulated {total} ways to run", file=sys.stderr, flush=True)

    return on_progress
