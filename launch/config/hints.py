"""Suggests what a wrong word probably meant, including the names that other trainers use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.config import misspelled
from launch.config.choices import groups
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, parse_number
from launch.config.importers.names import NAMES, plain_name, translate
from launch.config.importers.rules import CHOICES
from launch.config.removed import NOT_OFFERED, REMOVED

SettingsByKey = Mapping[str, Any]
"""Every setting by its full name."""
FLAGS = ("--help", "--cfg", "--info", "--config-dir", "--dry-run", "--multirun", "--version")
SAME_IN_SUBMITIT = ("partition", "account", "qos", "cpus_per_task", "gpus_per_node", "nodes", "constraint", "exclusive")
"""Settings of Hydra's submitit launcher that `launcher.*` has under the same name."""


@dataclass(frozen=True, slots=True)
class Hint:
    """What to say about a word that cannot be used.

    `meant_keys` are the settings that the word was probably meant for. Composing complains about them as well, because they
    are not set; such a complaint only repeats this problem and is not shown.
    """

    word: str
    reason: str
    meant_keys: frozenset[str]

    @property
    def problem(self) -> str:
        """The line for the user."""
        return f"{self.word}: {self.reason}"


class ForeignWords:
    """The words of a command line that are settings of other trainers.

    They are collected first, because the translation of one may depend on another: a batch size on the number of ranks.
    """

    def __init__(self, words: list[str], is_ours: Callable[[str], bool]) -> None:
        """`words` as typed, in which `--name value` is one setting. `is_ours` says whether a key is a setting here."""
        self.words: list[str] = []
        """All words, in their order. `--name value` of another trainer has become one word."""
        self._foreign_values: dict[str, str] = {}
        self._name_by_word: dict[str, str] = {}
        remaining = list(words)
        while remaining:
            word = remaining.pop(0)
            key, assigned, value = word.partition("=")
            # Other trainers' flags come as `--name value`; ours are `key=value`.
            if word.startswith("--") and not assigned and plain_name(key) in NAMES:
                value = "true"  # a switch, unless a value follows
                if remaining and not remaining[0].startswith("--") and "=" not in remaining[0]:
                    value = remaining.pop(0)
                    word = f"{word} {value}"
            elif not assigned:
                self.words.append(word)
                continue
            self.words.append(word)
            name = plain_name(key)
            bare_key = key.lstrip("-+~")
            if name in NAMES and not is_ours(bare_key) and bare_key not in groups():
                self._foreign_values[name] = value.strip("'\"")
                self._name_by_word[word] = name
        typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
        self._ranks = ranks_of(typed, self._foreign_values)

    def hint(self, word: str) -> Hint | None:
        """What to type instead of the word; None if it is no setting of another trainer."""
        name = self._name_by_word.get(word)
        if name is None:
            return None
        translation = translate(name, ForeignSettings(self._foreign_values, self._ranks))
        if translation is None:
            return None
        meant_keys = frozenset(translation.words) | _sibling_keys(translation)
        return Hint(word, translation_text(translation), meant_keys)


def translation_text(translation: TranslatedSetting) -> str:
    """A translation as a sentence."""
    if translation.words:
        note = f" ({translation.note})" if translation.note else ""
        return f"here it is {_words_text(translation.words)}{note}"
    if translation.needless:
        return f"leave it out: {translation.note}" if translation.note else "leave it out"
    return f"there is no equal here: {translation.note}"


def _words_text(words: Mapping[str, str]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{key}={value}" for key, value in words.items())


def unknown_choice(group: str, text: str, word: str) -> str:
    """What to say about a choice that a group does not have."""
    if group in CHOICES:
        words = CHOICES[group](text, ForeignSettings({})).words
        if words:
            return f"{word}: no such choice; here it is {_words_text(words)}"
    choices = groups()[group]
    if group == "strategy" and text in ("deepspeed", "zero"):
        return f"{word}: no such choice; did you mean strategy=zero2 or strategy=zero3? All: {', '.join(choices)}"
    similar = difflib.get_close_matches(text, choices, n=1, cutoff=0.4)
    hint = f"; did you mean {group}={similar[0]}?" if similar else ""
    return f"{word}: no such choice, one of {', '.join(choices)}{hint}"


def hydra_setting(key: str, text: str, word: str) -> str:
    """What to say about a setting of Hydra's own, such as `hydra.run.dir`: what does the same here."""
    name = key.replace("/", ".").removeprefix("hydra.")
    equivalent = _equivalent_of_hydra(name, text)
    if equivalent is None:
        return f"{word}: Hydra's own settings cannot be changed; remove it"
    return f"{word}: Hydra's own settings cannot be changed; instead: {equivalent}"


def _equivalent_of_hydra(name: str, text: str) -> str | None:
    """What does here what a setting of Hydra's does; None if nothing does. `name`: without `hydra.`; `text`: its value."""
    if name in ("run.dir", "sweep.dir"):
        return f"run.dir={text} names the directory, and under -m the one of all points"
    if name == "launcher" and "submitit" in text:
        return "launcher=slurm submits, under -m one job array"
    if name == "launcher":
        return "the points of -m run one after another here, or as one job array with launcher=slurm"
    if name.startswith("launcher."):
        return f"launcher.{_submitit_setting(name.rsplit('.', 1)[-1], text)} with launcher=slurm"
    if name == "sweeper":
        return "values separated by commas under -m are run in all combinations; -m sweeper=optuna searches"
    if name == "sweeper.n_trials":
        return f"sweeper.trials={text} with -m sweeper=optuna"
    if name == "sweeper.sampler.seed":
        return f"sweeper.seed={text} with -m sweeper=optuna"
    if name.startswith("sweeper.params."):
        return f"-m {name.removeprefix('sweeper.params.')}={text}"
    if name == "searchpath":
        return "--config-dir <directory> adds one"
    if name == "verbose" or name.startswith("job_logging"):
        return "`shardtune logs <run>` shows what every rank said"
    return None


def _submitit_setting(name: str, text: str) -> str:
    """A setting of Hydra's submitit launcher as `launcher.*` has it."""
    renamed = {"timeout_min": f"time={text}:00", "mem_gb": f"mem={text}G", "tasks_per_node": f"processes={text}"}
    if name in renamed:
        return renamed[name]
    return f"{name}={text}" if name in SAME_IN_SUBMITIT else "<key>=<value>"


def condition(key: str, under: tuple[str, ...]) -> str:
    """The choice that a setting needs, as typed."""
    return f"{key.split('.')[0]}={'|'.join(under)}"


def not_a_pair(word: str) -> str:
    """What to say about a word that is not of the form key=value."""
    from launch.config.choices import variants

    bare = word.lstrip("-")
    if bare in misspelled.FLAGS_OF_OTHERS:
        return f"{word}: leave it out: {misspelled.FLAGS_OF_OTHERS[bare]}"
    if word.startswith("@"):
        return f"{word}: a file of settings is YAML and a bare word, as in my.yaml"
    if bare != word and "=" in bare:
        return f"{word}: settings have no dashes; type {bare}"
    if bare in groups():
        choices = [*variants().get(bare, groups()[bare])]
        return f"{word}: give its choice, as in {bare}={choices[0]}" if choices else f"{word}: no choices"
    similar = difflib.get_close_matches(word, FLAGS, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return f"{word}: not of the form key=value{hint}"


def take_split_settings(words: list[str], settings_by_key: SettingsByKey) -> tuple[list[str], list[str]]:
    """(the words that remain, a problem for each setting that was typed in several words).

    A shell splits `optim.lr = 1e-4` into three words, and `--optim.lr 1e-4` into two.
    """
    remaining: list[str] = []
    problems: list[str] = []
    unread = list(words)
    while unread:
        word = unread.pop(0)
        following = unread[0] if unread else ""
        if word in settings_by_key and following.startswith("="):
            value = unread.pop(0)[1:]
            if not value and unread:
                value = unread.pop(0)
            problems.append(f"{word} = {value}: no spaces around the equals sign; type {word}={value}")
        elif word.endswith("=") and word[:-1] in settings_by_key and _is_bare(following):
            unread.pop(0)
            problems.append(f"{word} {following}: no spaces around the equals sign; type {word}{following}")
        elif _is_dashed_key(word, settings_by_key) and _is_bare(following):
            unread.pop(0)
            key = word.lstrip("-").replace("-", "_")
            hint = f"type {key}={following}"
            if key not in settings_by_key:
                hint = unknown_key(key, f"{key}={following}", settings_by_key).reason
            problems.append(f"{word} {following}: settings have no dashes; {hint}")
        else:
            remaining.append(word)
    return remaining, problems


def _is_bare(word: str) -> bool:
    """Whether a word can be the value of the word before it."""
    return bool(word) and "=" not in word and not word.startswith("-")


def _is_dashed_key(word: str, settings_by_key: SettingsByKey) -> bool:
    """Whether a word is `--key` of a setting here, in full or its last part; not a flag, nor another trainer's name."""
    key = word.lstrip("-").replace("-", "_")
    if not word.startswith("--") or "=" in word or plain_name(word) in NAMES or key in misspelled.FLAGS_OF_OTHERS:
        return False
    last_parts = {name.rpartition(".")[2] for name in settings_by_key}
    is_setting = key in settings_by_key or key in last_parts
    return is_setting and not difflib.get_close_matches(word, FLAGS, n=1, cutoff=0.8)


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """What to say about a word whose key does not exist."""

    word: str
    reason: str
    meant_key: str | None = None
    """The setting that was probably meant."""

    @property
    def problem(self) -> str:
        """The line for the user."""
        return f"{self.word}: {self.reason}"

    @property
    def suspects(self) -> set[str]:
        """The setting that was probably meant, as a set."""
        return set() if self.meant_key is None else {self.meant_key}


def unknown_key(key: str, word: str, settings_by_key: SettingsByKey) -> UnknownKey:
    """What to say about a key that does not exist: where it went, or what is like it."""
    missing = f"there is no setting {key}"
    if key in REMOVED:
        return UnknownKey(word, f"{missing} any more: {REMOVED[key]}")
    if key in NOT_OFFERED:
        return UnknownKey(word, f"{missing}: {NOT_OFFERED[key]}")
    instead = misspelled.in_place_of(key, word.partition("=")[2])
    if instead is not None:
        return UnknownKey(word, f"{missing}; {instead}")
    # From what is certain to what is only similar.
    group = key.split(".")[0]
    last_part = key.split(".")[-1]
    if last_part == "name" and group in groups():
        return UnknownKey(word, f"chosen as a group; type {group}=<choice>, one of {', '.join(groups()[group])}")
    inside = sorted(name for name in settings_by_key if name.startswith(f"{key}."))
    if inside:
        return UnknownKey(word, f"{key} is not one value; set {', '.join(inside[:8])}")
    similar_group = _similar_group(key, word.partition("=")[2], settings_by_key)
    if similar_group is not None:
        return UnknownKey(word, f"{missing}; {similar_group}")
    candidates = _similar_keys(key, settings_by_key)
    if not candidates:
        return UnknownKey(word, missing)
    listed = []
    for candidate in candidates[:3]:
        under = settings_by_key[candidate].under
        listed.append(f"{candidate} (with {condition(candidate, under)})" if under else candidate)
    return UnknownKey(word, f"{missing}; did you mean {' or '.join(listed)}?", candidates[0])


def _similar_keys(key: str, settings_by_key: SettingsByKey) -> list[str]:
    """The settings that a mistyped key may mean, the likeliest first.

    Those that are nearly the same, or have the same last part; if there are none, more distant ones.
    """
    last_part = key.split(".")[-1]
    similar = difflib.get_close_matches(key, settings_by_key, n=1, cutoff=0.75)
    same_last_part = [name for name in settings_by_key if name.split(".")[-1] == last_part and name not in similar]
    if similar or same_last_part:
        return [*similar, *same_last_part]
    distant = difflib.get_close_matches(key, settings_by_key, n=1, cutoff=0.5)
    if distant:
        return distant
    last_parts = [name.split(".")[-1] for name in settings_by_key]
    similar_last_part = difflib.get_close_matches(last_part, last_parts, n=1, cutoff=0.7)
    return [name for name in settings_by_key if name.split(".")[-1] in similar_last_part]


def _similar_group(key: str, value: str, settings_by_key: SettingsByKey) -> str | None:
    """A question about the group that a key of one part looks like, with the value that was typed; None if none."""
    if "." in key:
        return None
    similar = difflib.get_close_matches(key, [*groups(), *settings_by_key], n=1, cutoff=0.7)
    groups_with_value = [name for name in groups() if value in groups()[name]]
    if similar and similar[0] in groups():
        group = similar[0]
    elif len(groups_with_value) == 1:
        group = groups_with_value[0]
    else:
        return None
    if value in groups()[group]:
        return f"did you mean {group}={value}?"
    return f"did you mean {group}=<choice>, one of {', '.join(groups()[group])}?"


def ranks_of(typed: Mapping[str, str], foreign_values: Mapping[str, str]) -> int | None:
    """Ranks of the run if the words say so, by our names or those of other trainers; else None."""
    settings = ForeignSettings({**foreign_values, **typed})
    per_node = parse_number(
        settings.get("launcher.processes", "launcher.gpus_per_node", "nproc_per_node", "num_processes")
    )
    nodes = parse_number(settings.get("launcher.nodes", "nnodes", "num_machines")) or 1
    return None if per_node is None else round(per_node * nodes)


def _sibling_keys(translation: TranslatedSetting) -> frozenset[str]:
    """`budget` or `batch`, if the translation sets one of theirs: a complaint about the group repeats the problem too."""
    return frozenset(key.split(".")[0] for key in translation.words if key.startswith(("budget.", "batch.")))
