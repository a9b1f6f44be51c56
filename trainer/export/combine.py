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
from typing import Any, NamedTuple

import torch

from strategies.errors import ConfigError
from strategies.small_files import read_json_object
from trainer.model.rope import CONFIG_FILE, adapter_config_source
from trainer.tuning.initial_adapter import SETTINGS_FILE, WEIGHTS_FILE, UnusableAdapter, read_adapter_settings


class Combination(StrEnum):
    """How the updates of several adapters are put together; the names are peft's."""

    cat = "cat"
    linear = "linear"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


COMBINATIONS_WITH_DENSITY = (Combination.ties, Combination.dare_linear, Combination.dare_ties)
"""Combinations that drop entries of the factors; `density` is the share that they keep."""
COMBINED_ADAPTER_NAME = "combined"
"""peft's name for the combined adapter in its model."""


@dataclass(kw_only=True, slots=True)
class CombineSettings:
    """The settings of a combination of adapters."""

    adapters: list[str]
    """Directories of LoRA adapters of the same base."""
    weights: list[float] = field(default_factory=list)
    """A factor for each adapter; empty: 1 for each."""
    combination: Combination = Combination.cat
    """How the updates are put together (the argument `combine=`)."""
    density: float = 0.5
    """Share of entries that `ties` and `dare` keep, above 0, at most 1."""
    seed: int = 0
    """Seed of the random choice of the entries that `dare` drops."""
    base: str | None = None
    """Directory of the base model; None: the one that the adapters name."""


def combination_problems(settings: CombineSettings) -> list[str]:
    """Check before anything is loaded whether these adapters can be combined; returns error messages, a line each.

    Reads only JSON files. First each adapter by itself (unreadable, no LoRA, DoRA), then the settings, then the adapters
    together: of different ranks or bases, or for another task than language modelling.
    """
    problems = []
    # Of the adapters that can be combined.
    peft_settings_by_directory: dict[str, dict[str, Any]] = {}
    for directory in settings.adapters:
        try:
            peft_settings_by_directory[directory] = _settings_of_combinable_adapter(directory)
        except UnusableAdapter as error:
            problems.append(f"adapters={directory}: {error}")
    if settings.weights and len(settings.weights) != len(settings.adapters):
        problems.append(
            f"weights={settings.weights}: {len(settings.weights)} for {len(settings.adapters)} adapters; give one for each"
        )
    if not 0 < settings.density <= 1:
        problems.append(f"density={settings.density:g}: must be above 0 and at most 1; 0.5 as a rule")
    return problems + _problems_between_adapters(settings, peft_settings_by_directory)


def _settings_of_combinable_adapter(directory: str) -> dict[str, Any]:
    """peft's settings of the adapter in `directory`. Raises UnusableAdapter if it cannot be read or combined with any other."""
    peft_settings = read_adapter_settings(directory)
    if peft_settings.get("peft_type") != "LORA":
        method = str(peft_settings.get("peft_type")).lower()
        raise UnusableAdapter(f"was made by {method}; only LoRA adapters can be combined")
    if peft_settings.get("use_dora"):
        raise UnusableAdapter("has magnitudes (DoRA), which do not add up; merge it alone")
    return peft_settings


def _problems_between_adapters(
    settings: CombineSettings, peft_settings_by_directory: dict[str, dict[str, Any]]
) -> list[str]:
    """Check whether adapters go together; returns a message for each reason why not.

    The reasons: different ranks (unless for `cat`), different bases (unless `base` is set), a task other than CAUSAL_LM.
    `peft_settings_by_directory`: the adapter_config.json of each adapter that can be combined at all.
    """
    problems = []
    rank_by_directory = {
        directory: peft_settings["r"] for directory, peft_settings in peft_settings_by_directory.items()
    }
    # `cat` stacks the factors, whatever their ranks.
    if settings.combination is not Combination.cat and len(set(rank_by_directory.values())) > 1:
        problems.append(
            f"combine={settings.combination}: needs adapters of one rank, not {rank_by_directory}; use combine=cat"
        )
    bases = {peft_settings.get("base_model_name_or_path") for peft_settings in peft_settings_by_directory.values()}
    if settings.base is None and len(bases) > 1:
        problems.append(f"adapters: name different bases ({', '.join(map(str, bases))}); give base=<dir>")
    tasks = {peft_settings.get("task_type") for peft_settings in peft_settings_by_directory.values()}
    if tasks - {"CAUSAL_LM"}:
        problems.append(
            f"adapters: of {', '.join(map(str, tasks))}; only those of causal language models can be combined"
        )
    return problems


def write_combination(
    settings: CombineSettings, output_dir: Path, *, merge: bool, dtype: torch.dtype | None, max_shard_gib: float
) -> str:
    """Combine several LoRA adapters of one base into one model, write it into `output_dir`, and verify it.

    `merge`: writes the merged model, else one adapter. `dtype`: stored type of a merged model; None: that of the base. What
    was written is loaded again, and its logits are compared with those of the combination in memory.

    Returns the path of the base model. Raises ConfigError for settings with problems or a base that cannot be loaded,
    DriftError if the logits differ, OSError if the disk fails.
    """
    from transformers import AutoTokenizer

    from trainer.export.tensors import stored_dtype
    from trainer.export.verify import probe_ids, verify_export

    problems = combination_problems(settings)
    if problems:
        raise ConfigError(problems)
    first_peft_settings = read_json_object(Path(settings.adapters[0]).expanduser() / SETTINGS_FILE)
    base = str(settings.base or first_peft_settings["base_model_name_or_path"])
    base_config, base_model = _load_base(settings, base)
    # The tokenizer of the first adapter may have more tokens than that of the base.
    adapter_has_tokenizer = (Path(settings.adapters[0]).expanduser() / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(settings.adapters[0] if adapter_has_tokenizer else base)
    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Combine, compute logits to compare with, and write.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = _combine_adapters(settings, base_model)
        token_ids = probe_ids(tokenizer)
        with torch.no_grad():
            reference = model(input_ids=torch.tensor([token_ids])).logits[0].float()
        output_dir.mkdir(parents=True, exist_ok=True)
        if merge:
            _write_merged_model(model, dtype or stored_dtype(Path(base)), max_shard_gib, output_dir)
        else:
            _write_combined_adapter(model, base, output_dir)
            has_other_positions = _base_config_directory(settings, base) != base
            if has_other_positions:  # loaders of the adapter need the configuration that it was trained with
                base_config.save_pretrained(str(output_dir))
    tokenizer.save_pretrained(str(output_dir))
    verification = verify_export(output_dir, base_path=base, token_ids=token_ids, reference=reference)
    print(f"export verified: {verification}", flush=True)
    return base


def _load_base(settings: CombineSettings, base: str) -> tuple[Any, Any]:
    """Load the base of the adapters in float32; returns (its configuration with the positions of the training, the model).

    `base`: a directory or hub id. The configuration is the base's own, or that in the first adapter's directory if training
    changed the positions. Raises ConfigError if it cannot be loaded, or if the adapters were trained with different positions.
    """
    from transformers import AutoConfig

    from trainer.model.architecture import transformers_class
    from trainer.model.config import ModelKind

    try:
        config = AutoConfig.from_pretrained(_base_config_directory(settings, base), local_files_only=True)
        model_class = transformers_class(ModelKind.causal, config)
        model = model_class.from_pretrained(base, config=config, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base={base}: cannot be loaded ({str(error)[:200]}); give base=<model directory>") from error
    return config, model


def _combine_adapters(settings: CombineSettings, base_model: Any) -> Any:
    """Put the adapters on the base and combine them into one, by peft: returns its model with that one active, in eval mode.

    Seeds torch's generator, since some combinations drop random entries. Raises ConfigError if peft refuses.
    """
    from peft import PeftModel

    names = [f"adapter_{number}" for number in range(len(settings.adapters))]
    density_argument = {"density": settings.density} if settings.combination in COMBINATIONS_WITH_DENSITY else {}
    # peft needs every adapter under a name of its own before it can combine them.
    model: Any = PeftModel.from_pretrained(base_model, settings.adapters[0], adapter_name=names[0])
    for name, directory in zip(names[1:], settings.adapters[1:], strict=True):
        model.load_adapter(directory, adapter_name=name)
    weights = settings.weights or [1.0] * len(names)
    torch.manual_seed(settings.seed)
    try:
        model.add_weighted_adapter(
            names, weights, COMBINED_ADAPTER_NAME, combination_type=str(settings.combination), **density_argument
        )
    except ValueError as error:
        raise ConfigError(f"combine={settings.combination}: peft refuses: {' '.join(str(error).split())}") from error
    model.set_adapter(COMBINED_ADAPTER_NAME)
    return model.eval()


def _write_merged_model(model: Any, dtype: torch.dtype, max_shard_gib: float, output_dir: Path) -> None:
    """Merge the combined adapter into the base model, and write the model into `output_dir`, stored as `dtype`."""
    merged = model.merge_and_unload(adapter_names=[COMBINED_ADAPTER_NAME], safe_merge=True)
    merged.to(dtype)
    merged.save_pretrained(output_dir, max_shard_size=int(max_shard_gib * 2**30))


def _write_combined_adapter(model: Any, base_path: str, output_dir: Path) -> None:
    """Write the weights and settings of the combined adapter into `output_dir`, as an adapter of the base at `base_path`.

    Not by peft's `save_pretrained`, which would write them one directory deeper, with a model card beside.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter_tensors = get_peft_model_state_dict(model, adapter_name=COMBINED_ADAPTER_NAME, save_embedding_layers=False)
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.contiguous().clone() for name, tensor in adapter_tensors.items()}
    save_file(tensors, output_dir / WEIGHTS_FILE, {"format": "pt"})
    peft_config = model.peft_config[COMBINED_ADAPTER_NAME]
    peft_config.base_model_name_or_path = base_path
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(output_dir))


def _base_config_directory(settings: CombineSettings, base: str) -> str:
    """The directory or hub id whose config.json describes the base as the adapters were trained with it.

    That is the base, or the first adapter's directory if training changed the positions. Raises ConfigError if the adapters
    were trained with different positions: no one model computes what each of them learned.
    """
    # `base` for an adapter that kept the positions of the base, else the adapter's own directory.
    sources = [adapter_config_source(Path(directory).expanduser(), base) for directory in settings.adapters]
    positions_of_adapters = [_positions_in_config(source) for source in sources]
    first_uses_base = sources[0] == base
    for directory, source, positions in zip(settings.adapters, sources, positions_of_adapters, strict=True):
        uses_base = source == base
        if uses_base != first_uses_base or positions != positions_of_adapters[0]:
            raise ConfigError(
                f"adapters={directory}: was trained under other positions (model.positions, model.rope) than "
                f"{settings.adapters[0]}; combine adapters of the same positions"
            )
    return sources[0]


class _Positions(NamedTuple):
    """The positions of a model, as its config.json has them; None where it says nothing."""

    num_positions: Any
    rope_parameters: Any


def _positions_in_config(source: str) -> _Positions:
    """The positions in the config.json of a directory; unknown, for a hub id."""
    config = read_json_object(Path(source) / CONFIG_FILE) if Path(source).is_dir() else {}
    text_config = config.get("text_config") or config
    return _Positions(text_config.get("max_position_embeddings"), text_config.get("rope_parameters"))
