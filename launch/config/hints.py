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
from launch.config.removed import REMOVED

SettingsByKey = Mapping[str, Any]
"""Every setting by its full name."""
FLAGS = ("--help", "--cfg", "--info", "--config-dir", "--dry-run", "--multirun", "--version")


@dataclass(frozen=True, slots=True)
class Hint:
    """A problem, and the keys of ours that were meant: complaints about them would be echoes."""

    problem: str
    meant_keys: frozenset[str]


class ForeignWords:
    """The words of a command line that are settings of other trainers, each to be answered with the others in sight."""

    def __init__(self, words: list[str], is_ours: Callable[[str], bool]) -> None:
        """`words` as typed, of which `--name value` are one; `is_ours` says whether a key is a setting here."""
        self.words: list[str] = []
        self._foreign_values: dict[str, str] = {}
        self._name_by_word: dict[str, str] = {}
        remaining = list(words)
        while remaining:
            word = remaining.pop(0)
            key, assigned, value = word.partition("=")
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
            if name in NAMES and not is_ours(key.lstrip("-+~")) and key.lstrip("-+~") not in groups():
                self._foreign_values[name] = value.strip("'\"")
                self._name_by_word[word] = name
        typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
        self._ranks = ranks_of(typed, self._foreign_values)

    def hint(self, word: str) -> Hint | None:
        """What the word is here; None where it is no other trainer's."""
        name = self._name_by_word.get(word)
        translation = None if name is None else translate(name, ForeignSettings(self._foreign_values, self._ranks))
        if translation is None:
            return None
        return Hint(
            f"{word}: {translation_text(translation)}", frozenset(translation.words) | _sibling_keys(translation)
        )


def translation_text(translation: TranslatedSetting) -> str:
    """An answer as a sentence."""
    if translation.words:
        note = f" ({translation.note})" if translation.note else ""
        return "here it is " + " ".join(f"{key}={value}" for key, value in translation.words.items()) + note
    if translation.needless:
        return f"leave it out{': ' if translation.note else ''}{translation.note}"
    return f"there is no equal here: {translation.note}"


def unknown_choice(group: str, text: str, word: str) -> str:
    """What to say about a choice that a group does not have."""
    if group in CHOICES and (words := CHOICES[group](text, ForeignSettings({})).words):
        return f"{word}: no such choice; here it is " + " ".join(f"{key}={value}" for key, value in words.items())
    choices = groups()[group]
    if group == "strategy" and text in ("deepspeed", "zero"):
        return f"{word}: no such choice; did you mean strategy=zero2 or strategy=zero3? All: {', '.join(choices)}"
    near = difflib.get_close_matches(text, choices, n=1, cutoff=0.4)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{word}: no such choice, one of {', '.join(choices)}{hint}"


def hydra_setting(key: str, text: str, word: str) -> str:
    """What does here what Hydra's own settings do."""
    name = key.replace("/", ".").removeprefix("hydra.")
    last = name.rsplit(".", 1)[-1]
    if name in ("run.dir", "sweep.dir"):
        equivalent = f"run.dir={text} names the directory, and under -m the one of all points"
    elif name == "launcher" and "submitit" in text:
        equivalent = "launcher=slurm submits, under -m one job array"
    elif name == "launcher":
        equivalent = "the points of -m run one after another here, or as one job array with launcher=slurm"
    elif name.startswith("launcher."):
        same_name_here = {
            "partition",
            "account",
            "qos",
            "cpus_per_task",
            "gpus_per_node",
            "nodes",
            "constraint",
            "exclusive",
        }
        renamed_here = {
            "timeout_min": f"time={text}:00",
            "mem_gb": f"mem={text}G",
            "tasks_per_node": f"processes={text}",
        }
        equivalent = f"launcher.{renamed_here.get(last, f'{last}={text}' if last in same_name_here else '<key>=<value>')} with launcher=slurm"
    elif name == "sweeper":
        equivalent = "values separated by commas under -m are run in all combinations; -m sweeper=optuna searches"
    elif name in ("sweeper.n_trials", "sweeper.sampler.seed"):
        equivalent = f"sweeper.{'trials' if last == 'n_trials' else last}={text} with -m sweeper=optuna"
    elif name.startswith("sweeper.params."):
        equivalent = f"-m {name.removeprefix('sweeper.params.')}={text}"
    elif name == "searchpath":
        equivalent = "--config-dir <directory> adds one"
    elif name in ("verbose", "job_logging") or name.startswith("job_logging"):
        equivalent = "`shardtune logs <run>` shows what every rank said"
    else:
        return f"{word}: Hydra's own settings are fixed here; remove it"
    return f"{word}: Hydra's own settings are fixed here; in its place: {equivalent}"


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
        first = next(iter(variants().get(bare, groups()[bare])), None)
        return f"{word}: give its choice, as in {bare}={first}" if first else f"{word}: no choices"
    near = difflib.get_close_matches(word, FLAGS, n=1)
    return f"{word}: not of the form key=value" + (f"; did you mean {near[0]}?" if near else "")


def join_split_words(words: list[str], settings_by_key: SettingsByKey) -> tuple[list[str], list[str]]:
    """(the words that remain, a problem for each setting that was typed in several words).

    A shell splits `optim.lr = 1e-4` into three words, and `--optim.lr 1e-4` into two.
    """
    remaining: list[str] = []
    problems: list[str] = []
    to_read = list(words)
    while to_read:
        word = to_read.pop(0)
        following = to_read[0] if to_read else ""
        if word in settings_by_key and following.startswith("="):
            value = to_read.pop(0)[1:] or (to_read.pop(0) if to_read else "")
            problems.append(f"{word} = {value}: no spaces around the equals sign; type {word}={value}")
        elif word.endswith("=") and word[:-1] in settings_by_key and _is_bare(following):
            problems.append(f"{word} {to_read.pop(0)}: no spaces around the equals sign; type {word}{following}")
        elif _is_dashed_key(word, settings_by_key) and _is_bare(following):
            key = word.lstrip("-").replace("-", "_")
            problem, _ = unknown_key(key, f"{key}={to_read.pop(0)}", settings_by_key)
            hint = f"type {key}={following}" if key in settings_by_key else problem.partition(": ")[2]
            problems.append(f"{word} {following}: settings have no dashes; {hint}")
        else:
            remaining.append(word)
    return remaining, problems


def _is_bare(word: str) -> bool:
    """Whether a word can be the value of the word before it."""
    return bool(word) and "=" not in word and not word.startswith("-")


def _is_dashed_key(word: str, settings_by_key: SettingsByKey) -> bool:
    """Whether a word is `--key`, of a setting here or one that looks like a setting; flags and other trainers' names are not."""
    key = word.lstrip("-").replace("-", "_")
    if not word.startswith("--") or "=" in word or plain_name(word) in NAMES or key in misspelled.FLAGS_OF_OTHERS:
        return False
    is_setting = key in settings_by_key or key in {name.rpartition(".")[2] for name in settings_by_key}
    return is_setting and not difflib.get_close_matches(word, FLAGS, n=1, cutoff=0.8)


def unknown_key(key: str, word: str, settings_by_key: SettingsByKey) -> tuple[str, str | None]:
    """What to say about a key that does not exist, and the key that was probably meant."""
    if key in REMOVED:
        return f"{word}: there is no setting {key} any more: {REMOVED[key]}", None
    if (words := misspelled.in_place_of(key, word.partition("=")[2])) is not None:
        return f"{word}: there is no setting {key}; {words}", None
    if key.split(".")[-1] == "name" and key.split(".")[0] in groups():
        group = key.split(".")[0]
        return f"{word}: chosen as a group; type {group}=<choice>, one of {', '.join(groups()[group])}", None
    if any(candidate.startswith(f"{key}.") for candidate in settings_by_key):
        inside = sorted(candidate for candidate in settings_by_key if candidate.startswith(key + "."))
        return f"{word}: {key} is not one value; set {', '.join(inside[:8])}", None
    if (group_problem := _similar_group(key, word, settings_by_key)) is not None:
        return group_problem, None
    similar = difflib.get_close_matches(key, settings_by_key, n=1, cutoff=0.75)
    last = key.split(".")[-1]
    same_last_part = [
        candidate for candidate in settings_by_key if candidate.split(".")[-1] == last and candidate not in similar
    ]
    candidates = [*similar, *same_last_part] or difflib.get_close_matches(key, settings_by_key, n=1, cutoff=0.5)
    if not candidates:
        similar_last_part = difflib.get_close_matches(
            last, [candidate.split(".")[-1] for candidate in settings_by_key], n=1, cutoff=0.7
        )
        candidates = [
            candidate
            for candidate in settings_by_key
            if similar_last_part and candidate.split(".")[-1] == similar_last_part[0]
        ]
    candidates_text = " or ".join(
        f"{candidate} (with {condition(candidate, settings_by_key[candidate].under)})"
        if settings_by_key[candidate].under
        else candidate
        for candidate in candidates[:3]
    )
    return f"{word}: there is no setting {key}" + (
        f"; did you mean {candidates_text}?" if candidates_text else ""
    ), candidates[0] if candidates else None


def _similar_group(key: str, word: str, settings_by_key: SettingsByKey) -> str | None:
    """The group that a key of one part looks like, with the value that was typed."""
    value = word.partition("=")[2]
    groups_with_value = [name for name in groups() if value in groups()[name]]
    similar = difflib.get_close_matches(key, [*groups(), *settings_by_key], n=1, cutoff=0.7)
    similar = [name for name in similar if name in groups()]
    group = similar[0] if similar else groups_with_value[0] if len(groups_with_value) == 1 and "." not in key else None
    if group is None or "." in key:
        return None
    if value in groups()[group]:
        return f"{word}: there is no setting {key}; did you mean {group}={value}?"
    return f"{word}: there is no setting {key}; did you mean {group}=<choice>, one of {', '.join(groups()[group])}?"


def ranks_of(typed: Mapping[str, str], foreign_values: Mapping[str, str]) -> int | None:
    """Ranks of the run where the words say so."""
    settings = ForeignSettings({**foreign_values, **typed})
    per_node = parse_number(
        settings.get("launcher.processes", "launcher.gpus_per_node", "nproc_per_node", "num_processes")
    )
    nodes = parse_number(settings.get("launcher.nodes", "nnodes", "num_machines")) or 1
    return None if per_node is None else round(per_node * nodes)


def _sibling_keys(translation: TranslatedSetting) -> frozenset[str]:
    """A budget or batch that was meant stands for its siblings."""
    return frozenset(key.split(".")[0] for key in translation.words if key.startswith(("budget.", "batch.")))
