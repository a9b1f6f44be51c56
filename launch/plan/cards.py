"""The card (GPU) that `shardtune plan` plans for: reads its file, and checks its figures."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.choices import CONF_DIR
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.planner.hardware import Card

SHIPPED_CARD_NAMES = sorted(file.stem for file in (CONF_DIR / "hardware").glob("*.yaml"))


def read_card(name: str) -> Card:
    """The card that `hardware=` names: the path of a YAML file, or a name in conf/hardware/. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from trainer.planner.hardware import Card

    try:
        card_settings = OmegaConf.merge(OmegaConf.structured(Card), _load_card_file(_find_card_file(name)))
    except OSError as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"hardware={name}: {first_line}; {_advice_on_unknown_card(name)}") from error
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        # Without the lines with the full key and type that OmegaConf appends.
        reason = " ".join(str(error).split("\n    full_key")[0].split())
        raise ConfigError(f"hardware={name}: {reason}; write it as those of conf/hardware/ are") from error
    card = OmegaConf.to_object(card_settings)
    assert isinstance(card, Card)
    return card


def _advice_on_unknown_card(name: str) -> str:
    """What to type in place of a card that does not exist: the cards with a similar name, or else all of them.

    `h100` gives "did you mean h100_80g?", and `a100` names both sizes of memory. `cpu` names the command that describes a run on
    this machine, since a plan is for a GPU.
    """
    if name.lower() in ("cpu", "mps", "local"):
        return "plan is for a GPU; shardtune train --dry-run, with the same settings, describes the run on this machine"
    similar = [card_name for card_name in SHIPPED_CARD_NAMES if card_name.startswith(name.lower())]
    similar = similar or difflib.get_close_matches(name.lower(), SHIPPED_CARD_NAMES, n=1)
    return f"did you mean {' or '.join(similar)}?" if similar else f"one of {', '.join(SHIPPED_CARD_NAMES)}"


def _find_card_file(name: str) -> Path:
    """The YAML file of a card: the path that was typed, or the file of that name in conf/hardware/.

    Raises OSError if it is missing.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
    else:
        file = CONF_DIR / "hardware" / f"{name}.yaml"
    if not file.is_file():
        raise OSError("there is no such card")  # `read_card` adds the name
    return file


def _load_card_file(file: Path) -> Any:
    """The keys of a card's YAML file. Raises ValueError if it holds something else, OSError or YAMLError if it cannot be read."""
    from omegaconf import DictConfig, OmegaConf

    contents = OmegaConf.load(file)
    if not isinstance(contents, DictConfig):
        raise ValueError("the file must hold keys, as in memory_gib: 80")
    return contents


def card_problems(card: Card) -> list[str]:
    """Error messages for figures of a card (GPU) that are missing or impossible. Without them nothing can be planned."""
    from strategies.base import Precision

    # Of the last three: measured over estimated, 1 without a measurement.
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
