"""Several adapters of one base as one: peft's own weighted combinations, into a merged model or one adapter.

In one process, on the CPU, with the base held once in float32. `cat` stacks the factors and is exactly the weighted sum of
the updates; the others trade that for a small rank: `linear` sums the factors themselves, `ties` (Yadav et al. 2023,
arXiv:2306.01708) and `dare` (Yu et al. 2023, arXiv:2311.03099) first drop small or random entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from strategies.errors import ConfigError
from strategies.small_files import read_object
from trainer.model.rope import CONFIG, adapter_config_source
from trainer.tuning.initial_adapter import SETTINGS, WEIGHTS, read_settings


class Combination(StrEnum):
    """How updates are put together; names are peft's."""

    cat = "cat"
    linear = "linear"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


PRUNING = (Combination.ties, Combination.dare_linear, Combination.dare_ties)
"""Those that drop entries, so that `density` has a meaning."""
COMBINED = "combined"
"""peft's name for the adapter that is made."""


@dataclass(kw_only=True, slots=True)
class CombineSettings:
    """The settings of a combination of adapters."""

    adapters: list[str]
    """Directories of LoRA adapters of the same base."""
    weights: list[float] = field(default_factory=list)
    """A factor for each; default: 1."""
    combination: Combination = Combination.cat
    """How the updates are put together; the word `combine=`."""
    density: float = 0.5
    """Share of entries that `ties` and `dare` keep, above 0, at most 1."""
    seed: int = 0
    """Seed of the random choice of the entries that `dare` drops."""
    base: str | None = None
    """Model directory; default: the one that the adapters name."""


def problems(settings: CombineSettings) -> list[str]:
    """What is wrong with the settings and the directories, one line each; reads only their JSON."""
    lines = []
    # Each adapter by itself.
    settings_by_adapter = {}
    """peft's settings by directory, of the adapters that can be combined."""
    for directory in settings.adapters:
        adapter = read_settings(directory)
        if isinstance(adapter, str):
            why_unreadable = adapter
            lines.append(f"adapters={directory}: {why_unreadable}")
        elif adapter.get("peft_type") != "LORA":
            method = str(adapter.get("peft_type")).lower()
            lines.append(f"adapters={directory}: was made by {method}; only LoRA adapters can be combined")
        elif adapter.get("use_dora"):
            lines.append(f"adapters={directory}: has magnitudes (DoRA), which do not add up; merge it alone")
        else:
            settings_by_adapter[directory] = adapter
    # The settings, then the adapters with each other.
    if settings.weights and len(settings.weights) != len(settings.adapters):
        lines.append(
            f"weights={settings.weights}: {len(settings.weights)} for {len(settings.adapters)} adapters; give one for each"
        )
    if not 0 < settings.density <= 1:
        lines.append(f"density={settings.density:g}: must be above 0 and at most 1; 0.5 as a rule")
    ranks = {directory: adapter["r"] for directory, adapter in settings_by_adapter.items()}
    if settings.combination is not Combination.cat and len(set(ranks.values())) > 1:
        lines.append(f"combine={settings.combination}: needs adapters of one rank, not {ranks}; use combine=cat")
    bases = {adapter.get("base_model_name_or_path") for adapter in settings_by_adapter.values()}
    if settings.base is None and len(bases) > 1:
        lines.append(f"adapters: name different bases ({', '.join(map(str, bases))}); give base=<dir>")
    tasks = {adapter.get("task_type") for adapter in settings_by_adapter.values()}
    if tasks - {"CAUSAL_LM"}:
        lines.append(f"adapters: of {', '.join(map(str, tasks))}; only those of causal language models can be combined")
    return lines


def combine(
    settings: CombineSettings, to: Path, *, merge: bool, dtype: torch.dtype | None, max_shard_gib: float
) -> str:
    """Write the merged model (or with `merge` off the one adapter) into the empty directory `to`; returns the base's path.

    `dtype`: stored type of a merged model; default: that of the base. Reloads what it wrote and compares logits.
    Errors: ConfigError, DriftError, OSError.
    """
    from transformers import AutoConfig, AutoTokenizer

    from trainer.export.tensors import stored_type
    from trainer.export.verify import probe_ids, verify_export
    from trainer.model.architecture import auto_class
    from trainer.model.config import ModelKind

    lines = problems(settings)
    if lines:
        raise ConfigError(lines)
    # Load the base.
    first = read_object(Path(settings.adapters[0]).expanduser() / SETTINGS)
    base = str(settings.base or first["base_model_name_or_path"])
    try:
        base_config = AutoConfig.from_pretrained(_config_source(settings, base), local_files_only=True)
        auto = auto_class(ModelKind.causal, base_config)
        base_model = auto.from_pretrained(base, config=base_config, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base={base}: cannot be loaded ({str(error)[:200]}); give base=<model directory>") from error
    tokenizer = AutoTokenizer.from_pretrained(settings.adapters[0] if _has_tokenizer(settings) else base)
    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Combine, compute logits to compare with, and write.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = _combine_adapters(settings, base_model)
        ids = probe_ids(tokenizer)
        with torch.no_grad():
            reference = model(input_ids=torch.tensor([ids])).logits[0].float()
        to.mkdir(parents=True, exist_ok=True)
        if merge:
            merged = model.merge_and_unload(adapter_names=[COMBINED], safe_merge=True)
            merged.to(dtype or stored_type(Path(base)))
            merged.save_pretrained(to, max_shard_size=int(max_shard_gib * 2**30))
        else:
            _save_adapter(model, base, to)
            if _config_source(settings, base) != base:
                base_config.save_pretrained(str(to))
    tokenizer.save_pretrained(str(to))
    verification = verify_export(to, base_path=base, token_ids=ids, reference=reference)
    print(f"export verified: {verification}", flush=True)
    return base


def _combine_adapters(settings: CombineSettings, base_model: Any) -> Any:
    """peft's model with the combination as its one active adapter, in eval mode. Seeds torch's generator.

    Raises ConfigError if peft refuses.
    """
    from peft import PeftModel

    names = [f"adapter_{number}" for number in range(len(settings.adapters))]
    pruning: dict[str, Any] = {}
    if settings.combination in PRUNING:
        pruning["density"] = settings.density
    model: Any = PeftModel.from_pretrained(base_model, settings.adapters[0], adapter_name=names[0])
    for name, directory in zip(names[1:], settings.adapters[1:], strict=True):
        model.load_adapter(directory, adapter_name=name)
    try:
        weights = settings.weights or [1.0] * len(names)
        torch.manual_seed(settings.seed)
        model.add_weighted_adapter(names, weights, COMBINED, combination_type=str(settings.combination), **pruning)
    except ValueError as error:
        raise ConfigError(f"combine={settings.combination}: peft refuses: {' '.join(str(error).split())}") from error
    model.set_adapter(COMBINED)
    return model.eval()


def _save_adapter(model: Any, base: str, to: Path) -> None:
    """Write the combined adapter itself; peft would put it one directory deeper, and a card beside that."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=COMBINED, save_embedding_layers=False)
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    settings = model.peft_config[COMBINED]
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.save_pretrained(str(to))


def _config_source(settings: CombineSettings, base: str) -> str:
    """The directory or hub id whose config.json describes the base as the adapters were trained with it.

    That is the base, or the first adapter's directory if training changed the positions. Raises ConfigError if the adapters were
    trained with different positions: no one model computes what each of them learned.
    """
    sources = [adapter_config_source(Path(directory).expanduser(), base) for directory in settings.adapters]
    positions = []
    for source in sources:
        config = read_object(Path(source) / CONFIG) if Path(source).is_dir() else {}
        text = config.get("text_config") or config
        # (number of positions, rope parameters)
        positions.append((text.get("max_position_embeddings"), text.get("rope_parameters")))
    for directory, source, own in zip(settings.adapters, sources, positions, strict=True):
        if (source == base) != (sources[0] == base) or own != positions[0]:
            raise ConfigError(
                f"adapters={directory}: was trained under other positions (model.positions, model.rope) than "
                f"{settings.adapters[0]}; combine adapters of the same positions"
            )
    return sources[0]


def _has_tokenizer(settings: CombineSettings) -> bool:
    """Whether the first adapter brings a tokenizer, which may have more tokens than that of the base."""
    return (Path(settings.adapters[0]).expanduser() / "tokenizer_config.json").is_file()
