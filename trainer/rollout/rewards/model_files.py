"""Where the parts of a reward model lie, and what is wrong with them, from its JSON files alone: nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from strategies.small_files import read_json_object

if TYPE_CHECKING:
    from trainer.objectives.rollouts import RewardEntry

BATCH_TOKENS = 8192
"""Tokens, padding included, that a reward model reads at a time."""
REWARD_MODEL_OPTIONS: dict[str, Any] = {"chat_template": None, "batch_tokens": BATCH_TOKENS}
"""Options of a reward that is a model, with their defaults."""
CLASSIFIER_CLASS_SUFFIX = "ForSequenceClassification"
"""How transformers' classes end that have a head of scores."""
SCORE_HEAD_NAMES = ("score", "classifier")
"""Names of such a head, which an adapter of a reward model brings along."""
ADAPTER_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class RewardModelFiles:
    """The directories of a reward model."""

    tokenizer: Path
    """Also what the user named, or the export of the run that was named."""
    base: str
    """Directory of config.json and of the weights. Of an adapter, its base, which may be an id of the hub."""
    adapter: Path | None = None


def reward_model_files(path: str, key: str) -> RewardModelFiles:
    """Find the parts of the reward model in `path`: a model, an adapter, or a run of `objective=reward` that has exported one.

    `key`: the setting `objective.rewards.NAME.path`. Raises ConfigError for what is no reward model.
    """
    directory = _reward_model_directory(Path(path).expanduser(), key)
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        adapter_settings = _read_json_object(directory / ADAPTER_CONFIG_FILE, key)
        trained_modules = set(adapter_settings.get("modules_to_save") or ())
        if adapter_settings.get("task_type") != "SEQ_CLS" and trained_modules.isdisjoint(SCORE_HEAD_NAMES):
            raise ConfigError(
                f"{key}={path}: is an adapter of a language model, which gives no scores; give one that objective=reward trained"
            )
        base_model = str(adapter_settings.get("base_model_name_or_path"))
        return RewardModelFiles(tokenizer=directory, base=base_model, adapter=directory)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}={path}: has neither config.json nor {ADAPTER_CONFIG_FILE}, so it is no model; give the export of a run of "
            "objective=reward"
        )
    _require_reward_model(_read_json_object(directory / "config.json", key), f"{key}={path}")
    return RewardModelFiles(tokenizer=directory, base=str(directory))


def _reward_model_directory(directory: Path, key: str) -> Path:
    """The directory itself, or its `export` if it is a run directory. Raises ConfigError if there is neither."""
    if not directory.is_dir():
        raise ConfigError(
            f"{key}={directory}: is no directory; give the export of a run of objective=reward, or fetch a reward model with "
            "shardtune download"
        )
    if not (directory / "config.yaml").is_file():
        return directory
    if not (directory / "export").is_dir():
        raise ConfigError(f"{key}={directory}: is a run without an export; write it with shardtune export {directory}")
    return directory / "export"


def _read_json_object(file: Path, key: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError, which begins with the setting `key`, if it cannot be read."""
    try:
        return read_json_object(file)
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{key}: {file} cannot be read ({error}); write it again") from None


def _require_reward_model(settings: Mapping[str, Any], setting_text: str) -> None:
    """Raise ConfigError unless the settings of a config.json are those of a classifier with one label, which gives one score.

    `setting_text`: the setting that names the model with its value, for the message.
    """
    architectures = settings.get("architectures") or []
    if not any(str(name).endswith(CLASSIFIER_CLASS_SUFFIX) for name in architectures):
        kind = ", ".join(map(str, architectures)) or "of no class that its config.json names"
        raise ConfigError(
            f"{setting_text}: is {kind}, and a reward model is ...{CLASSIFIER_CLASS_SUFFIX} with one "
            "label; train one with objective=reward"
        )
    # As in transformers: the number of label names counts, and a file that says nothing has two labels.
    label_names = settings.get("id2label")
    num_labels = len(label_names) if isinstance(label_names, dict) else int(settings.get("num_labels") or 2)
    if num_labels != 1:
        raise ConfigError(
            f"{setting_text}: has {num_labels} labels, and a reward model has one; train one with "
            "objective=reward, or call a classifier "
            "in a reward function"
        )


def reward_model_problems(reward: RewardEntry, key: str) -> Iterator[str]:
    """What is wrong with a reward that is a model, one line each; reads its files, but no weights.

    `key`: the setting that it stands under, such as `objective.rewards.helpful`.
    """
    yield from _reward_model_setting_problems(reward, key)
    yield from _reward_model_file_problems(reward, key)


def _reward_model_setting_problems(reward: RewardEntry, key: str) -> Iterator[str]:
    """What is wrong with the settings of a reward that is a model, one line each: its options and its time limit."""
    for option in reward.options:
        if option not in REWARD_MODEL_OPTIONS:
            yield f"{key}.options.{option}: a reward model has no such option; it has {', '.join(REWARD_MODEL_OPTIONS)}"
    if reward.timeout_s != type(reward)().timeout_s:  # not the default
        yield f"{key}.timeout_s={reward.timeout_s:g}: a reward model runs in the ranks and has no time limit; leave it out"
    tokens = reward.options.get("batch_tokens", BATCH_TOKENS)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        yield f"{key}.options.batch_tokens={tokens}: must be a number of tokens above 0"
    template = reward.options.get("chat_template")
    if template is not None and not Path(str(template)).expanduser().is_file():
        yield f"{key}.options.chat_template={template}: no such file; give a file with a Jinja chat template"


def _reward_model_file_problems(reward: RewardEntry, key: str) -> Iterator[str]:
    """What is wrong with the files of a reward model. It needs a tokenizer, and a chat template unless a setting gives one."""
    assert reward.path is not None
    try:
        files = reward_model_files(reward.path, f"{key}.path")
    except ConfigError as error:
        yield from error.problems
        return
    if not (files.tokenizer / "tokenizer.json").is_file() and not any(files.tokenizer.glob("*.model")):
        yield f"{key}.path={reward.path}: has no tokenizer.json, so its vocabulary is not known; copy its tokenizer's files there"
    elif reward.options.get("chat_template") is None and not _has_template(files.tokenizer):
        yield (
            f"{key}.path={reward.path}: has no chat template, so it is not known how it reads a prompt with its answer; give "
            f"one with {key}.options.chat_template=FILE"
        )


def _has_template(directory: Path) -> bool:
    """Whether a tokenizer's directory has a chat template."""
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
