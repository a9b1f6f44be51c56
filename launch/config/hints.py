"""Suggests what a wrong word probably meant, including the names that other trainers use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.config import misspelled
from launch.config.choices import groups
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, number
from launch.config.importers.names import NAMES, answer, plain
from launch.config.importers.rules import CHOICES
from launch.config.removed import REMOVED

Known = Mapping[str, Any]
"""Every setting by its full name."""
FLAGS = ("--help", "--cfg", "--info", "--config-dir", "--dry-run", "--multirun", "--version")


@dataclass(frozen=True, slots=True)
class Hint:
    """A problem, and the keys of ours that were meant: complaints about them would be echoes."""

    problem: str
    meant: frozenset[str]


class Foreign:
    """The words of a command line that are settings of other trainers, each to be answered with the others in sight."""

    def __init__(self, words: list[str], ours: Callable[[str], bool]) -> None:
        """`words` as typed, of which `--name value` are one; `ours` says whether a key is a setting here."""
        self.words: list[str] = []
        self._theirs: dict[str, str] = {}
        self._of: dict[str, str] = {}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            key, assigned, value = word.partition("=")
            if word.startswith("--") and not assigned and plain(key) in NAMES:
                value = "true"  # a switch, unless a value follows
                if rest and not rest[0].startswith("--") and "=" not in rest[0]:
                    value = rest.pop(0)
                    word = f"{word} {value}"
            elif not assigned:
                self.words.append(word)
                continue
            self.words.append(word)
            name = plain(key)
            if name in NAMES and not ours(key.lstrip("-+~")) and key.lstrip("-+~") not in groups():
                self._theirs[name] = value.strip("'\"")
                self._of[word] = name
        typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
        self._ranks = ranks_of(typed, self._theirs)

    def hint(self, word: str) -> Hint | None:
        """What the word is here; None where it is no other trainer's."""
        name = self._of.get(word)
        found = None if name is None else answer(name, ForeignSettings(self._theirs, self._ranks))
        if found is None:
            return None
        return Hint(f"{word}: {in_words(found)}", frozenset(found.words) | _families(found))


def in_words(found: TranslatedSetting) -> str:
    """An answer as a sentence."""
    if found.words:
        said = f" ({found.said})" if found.said else ""
        return "here it is " + " ".join(f"{key}={value}" for key, value in found.words.items()) + said
    if found.needless:
        return f"leave it out{': ' if found.said else ''}{found.said}"
    return f"there is no equal here: {found.said}"


def wrong_value(group: str, text: str, word: str) -> str:
    """What to say about a choice that a group does not have."""
    if group in CHOICES and (words := CHOICES[group](text, ForeignSettings({})).words):
        return f"{word}: no such choice; here it is " + " ".join(f"{key}={value}" for key, value in words.items())
    choices = groups()[group]
    if group == "strategy" and text in ("deepspeed", "zero"):
        return f"{word}: no such choice; did you mean strategy=zero2 or strategy=zero3? All: {', '.join(choices)}"
    near = difflib.get_close_matches(text, choices, n=1, cutoff=0.4)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{word}: no such choice, one of {', '.join(choices)}{hint}"


def of_hydra(key: str, text: str, word: str) -> str:
    """What does here what Hydra's own settings do."""
    name = key.replace("/", ".").removeprefix("hydra.")
    last = name.rsplit(".", 1)[-1]
    if name in ("run.dir", "sweep.dir"):
        does = f"run.dir={text} names the directory, and under -m the one of all points"
    elif name == "launcher" and "submitit" in text:
        does = "launcher=slurm submits, under -m one job array"
    elif name == "launcher":
        does = "the points of -m run one after another here, or as one job array with launcher=slurm"
    elif name.startswith("launcher."):
        known = {"partition", "account", "qos", "cpus_per_task", "gpus_per_node", "nodes", "constraint", "exclusive"}
        ours = {"timeout_min": f"time={text}:00", "mem_gb": f"mem={text}G", "tasks_per_node": f"processes={text}"}
        does = f"launcher.{ours.get(last, f'{last}={text}' if last in known else '<key>=<value>')} with launcher=slurm"
    elif name == "sweeper":
        does = "values separated by commas under -m are run in all combinations; -m sweeper=optuna searches"
    elif name in ("sweeper.n_trials", "sweeper.sampler.seed"):
        does = f"sweeper.{'trials' if last == 'n_trials' else last}={text} with -m sweeper=optuna"
    elif name.startswith("sweeper.params."):
        does = f"-m {name.removeprefix('sweeper.params.')}={text}"
    elif name == "searchpath":
        does = "--config-dir <directory> adds one"
    elif name in ("verbose", "job_logging") or name.startswith("job_logging"):
        does = "`shardtune logs <run>` shows what every rank said"
    else:
        return f"{word}: Hydra's own settings are fixed here; remove it"
    return f"{word}: Hydra's own settings are fixed here; in its place: {does}"


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


def split_by_spaces(words: list[str], known: Known) -> tuple[list[str], list[str]]:
    """(the words that remain, a problem for each setting that was typed in several words).

    A shell splits `optim.lr = 1e-4` into three words, and `--optim.lr 1e-4` into two.
    """
    remaining: list[str] = []
    problems: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        following = rest[0] if rest else ""
        if word in known and following.startswith("="):
            value = rest.pop(0)[1:] or (rest.pop(0) if rest else "")
            problems.append(f"{word} = {value}: no spaces around the equals sign; type {word}={value}")
        elif word.endswith("=") and word[:-1] in known and _is_bare(following):
            problems.append(f"{word} {rest.pop(0)}: no spaces around the equals sign; type {word}{following}")
        elif _is_dashed_key(word, known) and _is_bare(following):
            key = word.lstrip("-").replace("-", "_")
            problem, _ = unknown_key(key, f"{key}={rest.pop(0)}", known)
            hint = f"type {key}={following}" if key in known else problem.partition(": ")[2]
            problems.append(f"{word} {following}: settings have no dashes; {hint}")
        else:
            remaining.append(word)
    return remaining, problems


def _is_bare(word: str) -> bool:
    """Whether a word can be the value of the word before it."""
    return bool(word) and "=" not in word and not word.startswith("-")


def _is_dashed_key(word: str, known: Known) -> bool:
    """Whether a word is `--key`, of a setting here or one that looks like a setting; flags and other trainers' names are not."""
    key = word.lstrip("-").replace("-", "_")
    if not word.startswith("--") or "=" in word or plain(word) in NAMES or key in misspelled.FLAGS_OF_OTHERS:
        return False
    is_setting = key in known or key in {name.rpartition(".")[2] for name in known}
    return is_setting and not difflib.get_close_matches(word, FLAGS, n=1, cutoff=0.8)


def unknown_key(key: str, word: str, known: Known) -> tuple[str, str | None]:
    """What to say about a key that does not exist, and the key that was probably meant."""
    if key in REMOVED:
        return f"{word}: there is no setting {key} any more: {REMOVED[key]}", None
    if (words := misspelled.in_place_of(key, word.partition("=")[2])) is not None:
        return f"{word}: there is no setting {key}; {words}", None
    if key.split(".")[-1] == "name" and key.split(".")[0] in groups():
        group = key.split(".")[0]
        return f"{word}: chosen as a group; type {group}=<choice>, one of {', '.join(groups()[group])}", None
    if any(k.startswith(f"{key}.") for k in known):
        inside = sorted(k for k in known if k.startswith(key + "."))
        return f"{word}: {key} is not one value; set {', '.join(inside[:8])}", None
    if (group_problem := _group_meant(key, word, known)) is not None:
        return group_problem, None
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    last = key.split(".")[-1]
    elsewhere = [k for k in known if k.split(".")[-1] == last and k not in near]
    hints = [*near, *elsewhere] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not hints:
        wide = difflib.get_close_matches(last, [k.split(".")[-1] for k in known], n=1, cutoff=0.7)
        hints = [k for k in known if wide and k.split(".")[-1] == wide[0]]
    meant = " or ".join(f"{k} (with {condition(k, known[k].under)})" if known[k].under else k for k in hints[:3])
    return f"{word}: there is no setting {key}" + (f"; did you mean {meant}?" if meant else ""), hints[
        0
    ] if hints else None


def _group_meant(key: str, word: str, known: Known) -> str | None:
    """The group that a key of one part looks like, with the value that was typed."""
    value = word.partition("=")[2]
    fits = [name for name in groups() if value in groups()[name]]
    near = difflib.get_close_matches(key, [*groups(), *known], n=1, cutoff=0.7)
    near = [name for name in near if name in groups()]
    group = near[0] if near else fits[0] if len(fits) == 1 and "." not in key else None
    if group is None or "." in key:
        return None
    if value in groups()[group]:
        return f"{word}: there is no setting {key}; did you mean {group}={value}?"
    return f"{word}: there is no setting {key}; did you mean {group}=<choice>, one of {', '.join(groups()[group])}?"


def ranks_of(typed: Mapping[str, str], theirs: Mapping[str, str]) -> int | None:
    """Ranks of the run where the words say so."""
    found = ForeignSettings({**theirs, **typed})
    each = number(found.get("launcher.processes", "launcher.gpus_per_node", "nproc_per_node", "num_processes"))
    nodes = number(found.get("launcher.nodes", "nnodes", "num_machines")) or 1
    return None if each is None else round(each * nodes)


def _families(found: TranslatedSetting) -> frozenset[str]:
    """A budget or batch that was meant stands for its siblings."""
    return frozenset(key.split(".")[0] for key in found.words if key.startswith(("budget.", "batch.")))
