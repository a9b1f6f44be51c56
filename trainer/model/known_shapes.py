"""Published shapes of models: their config.json, for plans of a model whose files are not on this machine.

`trainer/model/shapes/<name>.json` holds one shape each: the hub ids that have it, the numbers of its config.json, where these
numbers were read, and the parameters that are published for it. A shape has no weights and no tokenizer, so it is enough for
`plan`, `submit --print` and `--dry-run`, and never for training.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trainer.model.config import ModelConfig

SHAPES_DIRECTORY = Path(__file__).parent / "shapes"


@dataclass(frozen=True, slots=True)
class KnownShape:
    """The published shape of a model, as a file of `shapes/` has it."""

    name: str
    """As in `model=llama3_8b`."""
    family: str
    """As in `Llama`."""
    hub: list[str]
    """Ids of the hub whose models have this shape. `model=<name>` means the first one."""
    parameters: int | str
    """Parameters as published: a count, or a rounded one such as `14.7B`."""
    parameters_from: str
    """Who published that count."""
    source: str
    """Where the numbers of `config` were read."""
    date: str
    """Day of the source's revision; the day it was read, if it has none."""
    config: dict[str, Any]
    """What config.json says of sizes and positions, `model_type` included."""
    note: str = ""
    """What the source leaves open."""


@cache
def shape_names() -> list[str]:
    """The names of all shapes in alphabetical order. No file is read."""
    return sorted(file.stem for file in SHAPES_DIRECTORY.glob("*.json"))


@cache
def read_shape(name: str) -> KnownShape:
    """The shape of this name, one of `shape_names`."""
    return KnownShape(name=name, **json.loads((SHAPES_DIRECTORY / f"{name}.json").read_text(encoding="utf-8")))


@cache
def names_by_hub_id() -> dict[str, str]:
    """The name of the shape of each hub id that is known."""
    names: dict[str, str] = {}
    for name in shape_names():
        names |= dict.fromkeys(read_shape(name).hub, name)
    return names


def shape_instead_of_files(config: ModelConfig) -> KnownShape | None:
    """The published sizes of a model (its shape) that stand for its files in plans; None if these are here, or none is known.

    A revision of a model may have another shape, so one that is named has none here. Nor has a model that may be downloaded: a
    hub that cannot be reached for a moment must not change what is trained.
    """
    path = config.path or ""
    name = names_by_hub_id().get(path)
    if name is None or config.revision is not None or config.download or Path(path).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    is_cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    return None if is_cached else read_shape(name)


def config_of_shape(shape: KnownShape) -> Any:
    """The transformers config of a shape, a new one for each call."""
    from transformers import AutoConfig

    settings = copy.deepcopy(shape.config)  # transformers writes into nested settings
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def shape_note(shape: KnownShape, path: str | None) -> str:
    """What a plan or a dry run says if a shape stands for the model's files."""
    return (
        f"model.path={path}: is not on this machine; its published shape {shape.name} stands for it ({shape.source}, "
        f"{shape.date}). Training needs the weights and the tokenizer: shardtune download model.path={path}"
    )
