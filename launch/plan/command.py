"""`shardtune plan`: memory, time and price of a run before there is one, on a card that need not be there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.output import FLAG, give
from launch.streams import draw

if TYPE_CHECKING:
    from launch.plan.from_run import Calibrated
    from trainer.config.run import RunConfig
    from trainer.planner.hardware import Card
    from trainer.planner.plan import PlanConfig

USAGE = """usage: shardtune plan [--json] hardware=<card> [key=value ...]

  shardtune plan model.path=models/llama3-8b data.max_length=4096 hardware=h100_80g \\
      launcher.nodes=4 launcher.gpus_per_node=8
  shardtune plan model.path=... data.path=train.jsonl hardware=a10g strategy=fsdp2 tuning=lora budget.epochs=3

Takes the words of `train`. What is typed stays as it is; strategy, strategy.activation_checkpointing and batch.micro are
looked at in all their values where they are not. The model needs its config.json alone; data only where data.path is given.

  hardware=<card>            one of these, or a YAML file like those of conf/hardware/:
{cards}
  hardware.<key>=...         another figure for it, as hardware.price_per_hour=2.10 or hardware.memory_gib=40
  launcher.nodes, launcher.gpus_per_node     the ranks; one card where nothing is said
  plan.offload=true          look at states in host memory too
  plan.quantisation=[none,nf4]               and at other ways to store a frozen base
  plan.exact=true            simulate whole models in place of two shallow ones each
  from=runs/first            reckon with what that run measured on this card: steps, memory, checkpoints
  plan.theirs=[stock_loss,pure_bf16]         what other trainers hold, told beside: stock_loss, fused_loss, fp32_head, pure_bf16
  plan.workers=0             processes that simulate; 0 takes one a core

Ends with 69 where nothing fits. docs/planning.md says what is counted, and how far it is from what was measured."""
OWN = ("plan", "hardware")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError, StorageError."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE.format(cards=", ".join(cards())))
        return 0
    as_json = FLAG in argv
    words = [word for word in argv if word != FLAG]
    own = [word for word in words if word.split("=")[0].split(".")[0] in OWN]
    froms = [word for word in words if word.startswith(("from=", "from."))]
    words = [word for word in words if word not in (*own, *froms)]
    card, settings = read_own(own)
    from launch.config.compose import ranks_of
    from launch.plan.answer import as_dict, text
    from launch.plan.job import job_of
    from trainer.model.loading import load_model_config
    from trainer.planner.plan import micro_batches, ways
    from trainer.planner.sweep import sweep

    config, typed = composed(words, card)
    # What can be known to be wrong is said before data is prepared, which may take an hour.
    found, refused = ways(config, settings, typed, ranks_of(config))
    load_model_config(config.model)
    measured = measured_by(froms, card, settings, ["plan", *argv])
    job = job_of(config, measured.card)
    micros = micro_batches(job, config.batch["micro"] if "batch.micro" in typed else None)
    answer = sweep(found, refused, job, micros, settings, _progress())
    if as_json:
        give(as_dict(answer, words, measured.said))
    else:
        print(text(answer, words, measured.said), flush=True)
    return 0 if answer.best is not None else 69


def measured_by(words: list[str], card: Card, settings: PlanConfig, command: list[str]) -> Calibrated:
    """The card as the run of `from=` found it, or as its file says. Errors: ConfigError."""
    from launch.config.read_run import take_words
    from launch.plan.from_run import ALLOWING, Calibrated, calibrated
    from strategies.errors import ConfigError

    allowing, words = take_words(words, ALLOWING)
    if wrong := [word for word in words if not word.startswith("from=")]:
        raise ConfigError(f"{wrong[0]}: allows nothing; from.* takes what the run of from= reaches out to")
    if allowing and not words:
        raise ConfigError(f"{ALLOWING}{allowing[0]}: there is no run that it allows something; name one with from=")
    if len(words) > 1:
        raise ConfigError(f"{' '.join(words)}: a plan goes by one run; name one")
    named = [word.partition("=")[2] for word in words]
    if named == [""]:
        raise ConfigError("from=: names no run; write from=runs/first, or leave it out")
    if not named:
        return Calibrated(card)
    print(f"simulating {named[0]} as it ran", file=sys.stderr, flush=True)
    return calibrated(card, named[0], settings, allowing, command)


def cards() -> list[str]:
    """The cards of conf/hardware."""
    from launch.config.choices import CONF_DIR

    return sorted(file.stem for file in (CONF_DIR / "hardware").glob("*.yaml"))


def read_own(words: list[str]) -> tuple[Card, PlanConfig]:
    """The card and the settings of the plan. Raises ConfigError with every problem."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from strategies.errors import ConfigError
    from trainer.planner.hardware import Card
    from trainer.planner.plan import PlanConfig

    problems: list[str] = []
    trees: dict[str, Any] = {"hardware": OmegaConf.structured(Card), "plan": OmegaConf.structured(PlanConfig)}
    named = [word.partition("=")[2] for word in words if word.startswith("hardware=")]
    if named:
        try:
            trees["hardware"] = OmegaConf.merge(trees["hardware"], _keys_of(_card_file(named[-1])))
        except OSError as error:
            problems.append(f"hardware={named[-1]}: {str(error).splitlines()[0]}; one of {', '.join(cards())}")
        except (OmegaConfBaseException, ValueError, YAMLError) as error:
            why = " ".join(str(error).split("\n    full_key")[0].split())
            problems.append(f"hardware={named[-1]}: {why}; write it as those of conf/hardware/ are")
    else:
        problems.append(f"hardware: not set; give the card to plan for, one of {', '.join(cards())}")
    for word in words:
        key, _, value = word.partition("=")
        if key == "hardware":
            continue
        group, _, leaf = key.partition(".")
        known = list(trees[group])
        if leaf not in known:
            problems.append(
                f"{word}: there is no setting {key}; one of {', '.join(f'{group}.{name}' for name in known)}"
            )
            continue
        try:
            trees[group] = OmegaConf.merge(trees[group], OmegaConf.from_dotlist([f"{leaf}={value}"]))
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(f"{word}: {str(error).splitlines()[0]}")
            if key in ("plan.quantisation", "plan.theirs") and not value.startswith("["):
                problems[-1] = f"{word}: is a list; write {key}=[{value}]"
    if trees["plan"].workers < 0:
        problems.append(f"plan.workers={trees['plan'].workers}: must be at least 0; 0 takes one a core")
    card, settings = OmegaConf.to_object(trees["hardware"]), OmegaConf.to_object(trees["plan"])
    assert isinstance(card, Card) and isinstance(settings, PlanConfig)
    problems = problems or _lacking(card)
    if problems:
        raise ConfigError(problems)
    return card, settings


def _card_file(name: str) -> Path:
    from launch.config.choices import CONF_DIR

    file = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else CONF_DIR / "hardware" / f"{name}.yaml"
    if not file.is_file():
        raise OSError("there is no such card")
    return file


def _keys_of(file: Path) -> Any:
    from omegaconf import DictConfig, OmegaConf

    read = OmegaConf.load(file)
    if not isinstance(read, DictConfig):
        raise ValueError("the file must hold keys, as in memory_gib: 80")
    return read


def _lacking(card: Card) -> list[str]:
    """What a card must say to be planned for."""
    from strategies.base import Precision

    rates = (
        "memory_gib",
        "fp32_tflops",
        "memory_gb_s",
        "link_gb_s",
        "node_gb_s",
        "host_gb_s",
        "disk_gb_s",
        "gpus_per_node",
        "pace",
        "tensors",
    )
    problems = [
        f"hardware.{name}={getattr(card, name):g}: must be above 0" for name in rates if getattr(card, name) <= 0
    ]
    if card.allocator < 0:
        problems.append(f"hardware.allocator={card.allocator:g}: must be at least 0; 0.05 is the allowance")
    if len(card.capability) != 2:
        problems.append(f"hardware.capability={card.capability}: must be two numbers, such as [9,0]")
    elif not card.tflops(card.precision(Precision.auto)):
        problems.append(
            f"hardware.name={card.name}: its speed is not known; give the driver's name of a card in docs/speed.md"
        )
    return problems


def composed(words: list[str], card: Card) -> tuple[RunConfig, set[str]]:
    """The configuration of a run on GPUs that need not be here, and the keys and groups that were typed. Raises ConfigError.

    Where they are not typed, `batch.micro` is 1 and `batch.global` the next multiple that the ranks can share. What is wrong
    with the settings is looked for by `trainer.planner.plan.ways`.
    """
    from launch.config.compose import compose, ranks_of
    from launch.config.overrides import parse
    from strategies.base import Precision
    from strategies.errors import ConfigError
    from trainer.config.run import AUTO, MICRO, STRATEGY, Device

    parsed = parse(words)
    # What the run would choose is what a plan looks at in all its values.
    chosen = {group for group, choice in parsed.choices.items() if (group, choice) != (STRATEGY, AUTO)}
    typed = chosen | {key for key, value, _ in parsed.values if (key, value) != (MICRO, AUTO)}
    # The launcher of a cluster settles nothing by this machine, and knows gpus_per_node.
    config = compose([*words, *([] if "launcher" in typed else ["launcher=slurm"])], check=False).config
    if "launcher.gpus_per_node" in typed and getattr(config.launcher, "gpus_per_node", 1) == 0:
        raise ConfigError("launcher.gpus_per_node=0: asks for nodes without GPUs; give the cards of a node to plan for")
    config.run.device = Device.cuda
    # launcher=local settles it by this machine; what it found is of no account.
    asked = Precision.auto if "precision" in config.substitutions else config.precision
    config = replace(config, precision=card.precision(asked))
    if MICRO not in typed:
        config.batch["micro"] = 1
    step = config.batch["micro"] * (ranks_of(config) or 0)
    if "batch.global" not in typed and step > 0:
        config.batch["global"] = -(-config.batch["global"] // step) * step
    return config, typed


def _progress() -> Any:
    """Tells on stderr what was done: one line that is written over in a terminal, else a line at the end."""
    shown = sys.stderr.isatty()

    def tell(done: int, of: int, what: str) -> None:
        if shown:
            draw(sys.stderr, "\r\033[K")
            print(
                f"simulated {done} of {of}: {what}"[:96],
                end="" if done < of else "\n",
                file=sys.stderr,
                flush=True,
            )
        elif done == of:
            print(f"simulated {of} ways to run", file=sys.stderr, flush=True)

    return tell
