"""Builds reward models beside the trained one: frozen, sharded by the run's strategy, and read by their own tokenizers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from strategies.base import Engine
from strategies.errors import ConfigError
from strategies.parameters import REWARD_MODELS_PREFIX
from strategies.runtime import Runtime
from trainer.config.run import RunConfig, settled_template_date
from trainer.data.config import Layout
from trainer.data.tokens.encode import Encoder
from trainer.model.architecture import text_model_config
from trainer.model.base_files import check_adapter_base, model_file_digests
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import find_weights_directory, load_model_config, load_tokenizer
from trainer.model.weights import BaseWeights, StartingWeights, WeightSource
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.layout_choice import build_padded_model
from trainer.objectives.rollouts import RewardEntry, RoundsConfig
from trainer.rollout.rewards.model import RewardModelReader, RewardModelScorer
from trainer.rollout.rewards.model_files import REWARD_MODEL_OPTIONS, RewardModelFiles, reward_model_files
from trainer.step import TrainStep
from trainer.tuning.compat.transformers import block_class_names
from trainer.tuning.full import Full
from trainer.tuning.merged_adapters import MergedAdapters


def reward_entries_with_models(objective: ObjectiveConfig) -> dict[str, RewardEntry]:
    """The rewards of a run that are models (classifiers that score answers), by name; empty for objectives without rewards."""
    if not isinstance(objective, RoundsConfig):
        return {}
    return {name: reward for name, reward in objective.rewards.items() if reward.path is not None}


def reward_model_configs_by_setting(objective: ObjectiveConfig) -> dict[str, ModelConfig]:
    """The settings by which each reward model's architecture is loaded, by the setting that names it:
    `objective.rewards.NAME.path=PATH`.

    Raises ConfigError if a path is no reward model.
    """
    config_by_setting = {}
    for name, reward in reward_entries_with_models(objective).items():
        path_setting = _path_setting(name)
        files = reward_model_files(str(reward.path), path_setting)
        # The options, such as a chat template, do not change the architecture.
        config_by_setting[f"{path_setting}={reward.path}"] = _loading_config(files, options={})
    return config_by_setting


def attach_reward_models(step: TrainStep, objective: ObjectiveConfig, source: Any, *, half_on_gpu: bool) -> None:
    """Add the run's reward models to a step module on meta, frozen, so that the engine shards them beside the trained model.

    Sets in `source.frozen_sources` where their weights are read. `source`: a `WeightSource`, or the stand-in of a plan.
    `half_on_gpu`: whether the run computes in half precision on a GPU. Reads only headers of files. Raises ConfigError if one
    cannot be built, or its weights do not fit.
    """
    for name, reward in reward_entries_with_models(objective).items():
        path_setting = _path_setting(name)
        with _naming_setting_in_errors(path_setting):
            files = reward_model_files(str(reward.path), path_setting)
            model = _reward_model_on_meta(files, half_on_gpu=half_on_gpu)
            weights = _reward_model_weights(files, path_setting, model)
            model.requires_grad_(False)
            model.eval()
        step.add_reward_model(name, model, block_class_names(model))
        source.frozen_sources[f"{REWARD_MODELS_PREFIX}{name}."] = weights


def _reward_model_on_meta(files: RewardModelFiles, *, half_on_gpu: bool) -> Any:
    """Build the architecture of a reward model, a classifier of one output for padded rows, without values.

    `files`: where its base, its tokenizer and perhaps an adapter lie. `half_on_gpu`: whether it computes in half precision on a
    GPU, which decides its attention. Raises ConfigError if it cannot be built.
    """
    loading_config = _loading_config(files, options={})
    hf_config = load_model_config(loading_config)
    hf_config.num_labels = 1
    if hf_config.pad_token_id is None:  # by which transformers finds the last token of a text
        hf_config.pad_token_id = _pad_token_id(hf_config, load_tokenizer(loading_config))
    model, _ = build_padded_model(
        ModelKind.classifier,
        loading_config,
        hf_config,
        # A row for each text. "reward" is what messages call the model.
        Layout.padded,
        "reward",
        half_on_gpu=half_on_gpu,
    )
    model.tie_weights()
    return model


def _reward_model_weights(files: RewardModelFiles, path_setting: str, model: Any) -> WeightSource | StartingWeights:
    """Where the weights of a reward model are read: in its base, with the adapter of `files` merged in, if there is one.

    `path_setting`: the setting that names the reward model. `model`: the reward model on meta. Raises ConfigError if a weight
    is missing or has another shape, or if the adapter was trained on another base.
    """
    directory = find_weights_directory(_loading_config(files, options={}))
    merged = None
    if files.adapter is not None:
        check_adapter_base(files.adapter, directory, accept=False)  # another base is refused: no setting accepts it
        merged = MergedAdapters(model, [str(files.adapter)], path_setting)
    # `Full`: the names of parameters are those of the files, without what a tuning method wraps around them.
    base_weights = WeightSource(BaseWeights(directory, copy.deepcopy(model)), Full(), seed=0, init_std=0.0)
    # The base must have every parameter, except those that the adapter has itself, such as the head: none is initialised.
    adapter_names = set() if merged is None else merged.changed_base_names()
    base_shapes = {}
    for name, parameter in model.named_parameters():
        if name not in adapter_names:
            base_shapes[name] = tuple(parameter.shape)
    base_weights.check_names_and_shapes(base_shapes, head_prefixes=())
    return base_weights if merged is None else StartingWeights(base_weights, merged)


def check_reward_models(config: RunConfig) -> None:
    """Check the tokenizers and chat templates of reward models before hours of preparation. Raises ConfigError."""
    for name, reward in reward_entries_with_models(config.objective).items():
        _open_reader(config, name, reward)


def _open_reader(config: RunConfig, name: str, reward: RewardEntry) -> RewardModelReader:
    """Open what turns prompts and answers into rows for a reward model: its tokenizer and chat template, with its limits.

    `name`, `reward`: the reward's key and settings. Raises ConfigError if it has no usable chat template.
    """
    path_setting = _path_setting(name)
    options = {**REWARD_MODEL_OPTIONS, **reward.options}
    with _naming_setting_in_errors(path_setting):
        loading_config = _loading_config(reward_model_files(str(reward.path), path_setting), options)
        hf_config = load_model_config(loading_config)
        tokenizer = load_tokenizer(loading_config)
        encoder = Encoder(tokenizer, control_tokens=config.data.control_tokens)
        if encoder.template is None:
            raise ConfigError(
                f"{path_setting}={reward.path}: has no chat template; give objective.rewards.{name}.options.chat_template"
            )
        # A template that writes today's date writes the run's on every day.
        encoder.fix_date(settled_template_date(config))
        pad_token_id = _pad_token_id(hf_config, tokenizer)
        reader = RewardModelReader(
            encoder,
            pad_token_id=pad_token_id,
            vocabulary_size=text_model_config(hf_config).vocab_size,
            max_positions=getattr(text_model_config(hf_config), "max_position_embeddings", None),
            max_batch_tokens=int(options["batch_tokens"]),
        )
    reader.raise_if_unable_to_score(f"{path_setting}={reward.path}")
    return reader


def _pad_token_id(hf_config: Any, tokenizer: Any) -> int:
    """The token that fills rows of a reward model: its configuration's, or else its tokenizer's.

    Raises ConfigError if neither has one.
    """
    pad_token_id = hf_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.pad_token_id  # `load_tokenizer` takes the end token where there is none
    if pad_token_id is None:
        raise ConfigError(
            f"{tokenizer.name_or_path}: has neither a padding token nor an end token; name a pad_token in its "
            "tokenizer_config.json"
        )
    return int(pad_token_id)


def open_model_scorer(
    config: RunConfig, engine: Engine, runtime: Runtime, stop_now: Callable[[], bool] = lambda: False
) -> RewardModelScorer | None:
    """Open the scorer of answers by the reward models in `engine`; None if the run has none. Raises ConfigError.

    `stop_now`: asked on all ranks after each micro-batch; True if the run shall stop.
    """
    readers = {
        name: _open_reader(config, name, reward)
        for name, reward in reward_entries_with_models(config.objective).items()
    }
    return RewardModelScorer(readers, engine, runtime, stop_now) if readers else None


def reward_model_digests(objective: ObjectiveConfig) -> dict[str, str]:
    """Digests of the files of reward models, by which a run notices that they changed: {"NAME/file": digest}.

    Those of an adapter's base are under "NAME/base/file". Raises ConfigError, or OSError if a file cannot be read.
    """
    digests: dict[str, str] = {}
    for name, reward in reward_entries_with_models(objective).items():
        path_setting = _path_setting(name)
        with _naming_setting_in_errors(path_setting):
            files = reward_model_files(str(reward.path), path_setting)
            # The tokenizer's files lie beside those of the model, or of its adapter.
            directory_by_prefix = {name: files.tokenizer}
            if files.adapter is not None:
                directory_by_prefix[f"{name}/base"] = find_weights_directory(_loading_config(files, options={}))
        for prefix, directory in directory_by_prefix.items():
            for file, digest in model_file_digests(directory).items():
                digests[f"{prefix}/{file}"] = digest
    return digests


def _loading_config(files: RewardModelFiles, options: dict[str, Any]) -> ModelConfig:
    """The settings by which a reward model is loaded. `options`: those of the reward, of which `chat_template` matters."""
    template = options.get("chat_template")
    return ModelConfig(
        path=files.base,
        tokenizer=str(files.tokenizer),
        chat_template=None if template is None else str(template),
    )


def _path_setting(name: str) -> str:
    """The setting that names a reward model: `helpful` -> `objective.rewards.helpful.path`."""
    return f"objective.rewards.{name}.path"


@contextmanager
def _naming_setting_in_errors(path_setting: str) -> Iterator[None]:
    """A context in which messages of ConfigErrors name a reward model's `path_setting`, in place of the trained model's.

    A reward model is loaded by the same functions as the trained model, whose messages name `model.path=...`.
    """
    try:
        yield
    except ConfigError as error:
        renamed_problems = []
        for problem in error.problems:
            renamed = problem
            for setting in ("model.path", "model.tokenizer", "model.chat_template"):
                # The look-behind leaves `rewards.model.path=` alone, the setting of a reward that is called `model`.
                renamed = re.sub(rf"(?<![\w.]){re.escape(setting)}=", lambda _: f"{path_setting}=", renamed, count=1)
            renamed_problems.append(renamed)
        raise ConfigError(renamed_problems) from error
