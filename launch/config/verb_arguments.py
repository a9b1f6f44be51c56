"""Reads the arguments of verbs that are no settings of a run. A verb declares its arguments as the fields of one dataclass:

    @dataclass(kw_only=True)
    class StopArguments(VerbArguments):
        run: Path = positional("name one run directory, as in shardtune stop runs/first")
        wait_s: int = option("seconds to wait; the run keeps saving after that", default=600, least=0)
        dry_run: bool = flag("say what would be done")

The declaration gives the values their types, `--help` its rows, and every argument that cannot be used its line of message.
What is special about a verb stands beside its declaration as plain conditions, which add to the same list of problems.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from launch.config.axes import split_at_commas
from launch.config.choices import choices_by_group

LOOKS_LIKE_KEY = re.compile(r"[+~]{0,2}[a-z_][\w./@*-]*=")
"""The start of `key=value`. An address has a colon before its `=`, a sentence a capital or spaces: both are positional."""
SPELLINGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WIDEST_HEAD = 28
"""Columns of an argument in `--help` up to which its text is lined up with that of the others."""
_SPEC = "spec"
Config = TypeVar("Config")


@dataclass(kw_only=True)
class VerbArguments:
    """Base class of the dataclasses in which verbs declare the arguments that they take."""

    typed: dict[str, str] = field(default_factory=dict)
    """The text of each argument that was typed, by its key, without flags and the entries of a list of positional arguments."""


Declared = TypeVar("Declared", bound=VerbArguments)


@dataclass(frozen=True, kw_only=True)
class ArgumentSpec:
    """How one argument is typed, which values it takes, and what `--help` says about it."""

    kind: str
    """`option` (key=value), `flag`, `positional` or `settings`."""
    text: str
    """Its sentence in `--help`. For a positional argument: what to say if there are more, or none."""
    key: str = ""
    """As it is typed; empty: the field's name, with `--` and dashes for a flag. An option may have dashes too: `--cfg job`."""
    also: tuple[str, ...] = ()
    """Other spellings of the key."""
    like: str = ""
    """The example value in `--help` and messages; empty: the default."""
    needs: str = ""
    """The key of another word that must be typed too, or its beginning, as in `to=hub:`."""
    required: str = ""
    """What to do if it is not typed; empty: it may be left out."""
    beginning: str = ""
    """For settings: the arguments that begin with this are taken; empty: all."""
    and_flags: bool = False
    """For settings: whether flags that the verb does not know are handed on too."""
    choices: tuple[str, ...] = ()
    """All values that it takes. For an argument with dashes, the first one is meant if it stands alone, as in `--cfg`."""
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None


def option(text: str, *, default: Any = None, **details: Any) -> Any:
    """An argument `key=value`. `details`: the fields of `ArgumentSpec`."""
    return _field_with_spec(default, ArgumentSpec(kind="option", text=text, **details))


def flag(text: str, **details: Any) -> Any:
    """A switch such as `--dry-run`, which changes the answer alone. `details`: `key`, `also` and `needs` of `ArgumentSpec`."""
    return _field_with_spec(False, ArgumentSpec(kind="flag", text=text, **details))


def positional(advice: str, *, required: bool = True, key: str = "run.dir") -> Any:
    """An argument without an equals sign, for which `key=` says the same. `advice`: what to name, if there are more, or none."""
    return _field_with_spec(
        None, ArgumentSpec(kind="positional", text=advice, key=key, required=advice if required else "")
    )


def positionals() -> Any:
    """The list of all positional arguments behind those that have fields of their own."""
    return _field_with_spec([], ArgumentSpec(kind="positional", text=""))


def forwarded_settings(*, beginning: str = "", and_flags: bool = False) -> Any:
    """The list of the arguments `key=value` that are not the verb's own, in their order: those that it hands on.

    `beginning`: only arguments that begin so are taken. `and_flags`: flags that the verb does not know are handed on too.
    """
    return _field_with_spec([], ArgumentSpec(kind="settings", text="", beginning=beginning, and_flags=and_flags))


def read_arguments(verb: str, declaration: type[Declared], argv: Iterable[str]) -> tuple[Declared, list[str]]:
    """Read a verb's command line into an object of `declaration`; also returns a problem for each argument that it cannot use."""
    reader = _ArgumentReader(verb, declaration)
    for argument in reader.join_dashed_values(list(argv)):
        reader.add(argument)
    return reader.finish()


def read_group(
    prefix: str, defaults: Config, arguments: Iterable[str], *, once: bool = False
) -> tuple[Config, list[str], list[str]]:
    """Read arguments `<prefix>.<field>=value` into a copy of `defaults`; returns (the settings, the other arguments, problems).

    `defaults`: an object of a dataclass whose annotations say what the values may be. `once`: a setting that is typed again is
    a problem; without it the last one counts, as in the arguments of a run.
    """
    annotations = get_type_hints(type(defaults))
    other_arguments: list[str] = []
    problems: list[str] = []
    changes: dict[str, Any] = {}
    for argument in arguments:
        key, assigned, text = argument.partition("=")
        group, dot, name = key.partition(".")
        if not (assigned and dot and group == prefix):
            other_arguments.append(argument)
        elif name not in annotations:
            similar = difflib.get_close_matches(name, annotations, n=1)
            known_names = ", ".join(f"{prefix}.{known}" for known in annotations)
            hint = f"did you mean {prefix}.{similar[0]}?" if similar else f"one of {known_names}"
            problems.append(f"{argument}: there is no setting {key}; {hint}")
        elif once and name in changes:
            problems.append(f"{argument}: {key} is given twice; give one")
        elif not text.strip():
            # A shell has put nothing in place of a variable that is not set.
            problems.append(f"{argument}: {key} needs a value")
        elif text == "null" and type(None) in get_args(annotations[name]):
            changes[name] = None
        else:
            try:
                changes[name] = parse_value(text, annotations[name])
            except ValueError as error:
                problems.append(f"{argument}: {error}")
    return replace(defaults, **changes), other_arguments, problems  # type: ignore[type-var]


def declared_in(module: ModuleType) -> list[type[VerbArguments]]:
    """The classes of verbs' arguments that a module defines or imports."""
    declarations = []
    for member in vars(module).values():
        if isinstance(member, type) and issubclass(member, VerbArguments) and member is not VerbArguments:
            declarations.append(member)
    return declarations


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` or `-h` is among the arguments."""
    return "--help" in argv or "-h" in argv


def did_you_mean(typed: str, known: Iterable[str], *, end: str = "") -> str:
    """`; did you mean ...?` with the known word that is most like the typed one; empty if none is. `end` is put behind it."""
    similar = difflib.get_close_matches(typed, list(known), n=1)
    return f"; did you mean {similar[0]}{end}?" if similar else ""


def help_rows(declaration: type[VerbArguments], extra_rows: Mapping[str, str] | None = None) -> str:
    """The rows of a verb's `--help`: one for each argument, then `extra_rows` (text by head), then one for each flag."""
    declared = specs(declaration)
    rows: dict[str, str] = {}
    for name, spec in declared.items():
        if spec.kind == "option":
            example = spec.like or _default_text(_default_of(declaration.__dataclass_fields__[name]))
            between = " " if spec.key.startswith("-") else "="
            rows[f"{spec.key}{between}{example}"] = spec.text
    rows |= extra_rows or {}
    for spec in declared.values():
        if spec.kind == "flag":
            rows[", ".join((spec.key, *spec.also))] = spec.text
    # A head that is wider than the column has its text on the next line, and does not widen the column for all.
    width = max((len(head) for head in rows if len(head) <= WIDEST_HEAD), default=0)
    return "\n".join(f"  {head:<{width}}  {text}" for head, text in rows.items())


def group_rows(prefix: str, settings: type) -> dict[str, str]:
    """Rows for `help_rows` about the arguments `<prefix>.<field>=`: the sentence under each field, by `key=default`."""
    from trainer.config.descriptions import docstrings

    sentences = docstrings(settings)
    rows = {}
    for setting in fields(settings):
        default_text = _default_text(_default_of(setting))
        rows[f"{prefix}.{setting.name}={default_text}"] = sentences[setting.name]
    return rows


def parse_value(text: str, annotation: Any, spec: ArgumentSpec | None = None) -> Any:
    """`text` as a value of the annotated type ("[1,2]" as list[int]: [1, 2]). Raises ValueError with what it must be."""
    spec = spec or ArgumentSpec(kind="option", text="")
    if get_origin(annotation) in (Union, types.UnionType):
        # Only `X | None` is declared.
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        if text == "null" and annotation is not str:
            return None
    if get_origin(annotation) is list:
        (entry_type,) = get_args(annotation)
        return [parse_value(entry, entry_type, spec) for entry in split_list(text)]
    if annotation is bool:
        if text.lower() not in SPELLINGS:
            raise ValueError("must be true or false")
        return SPELLINGS[text.lower()]
    if annotation in (int, float):
        return _number_in_bounds(text, annotation, spec)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        # By its name: that is how the settings of a run are typed.
        _check_choice(text, tuple(member.name for member in annotation))
        return annotation[text]
    if spec.choices:
        _check_choice(text, spec.choices)
    return Path(text).expanduser() if annotation is Path else text


def split_list(text: str) -> list[str]:
    """The entries of `[a,b]`, or of one entry without brackets, without the quotes around any of them."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    entries = []
    for entry in split_at_commas(inner):
        is_quoted = len(entry) > 1 and entry[0] == entry[-1] and entry[0] in "'\""
        if entry:
            entries.append(entry[1:-1] if is_quoted else entry)
    return entries


def _exists(argument: str) -> bool:
    """Whether an argument names a file or directory; a text too long for a name does not."""
    try:
        return Path(argument).exists()
    except OSError:
        return False


def _number_in_bounds(text: str, annotation: type, spec: ArgumentSpec) -> float:
    """The typed number as `annotation` (`int` or `float`), within its bounds. Raises ValueError with the bounds."""
    number = _parse_number(text, annotation)
    is_above = spec.above is None or number > spec.above
    if is_above and spec.least <= number <= spec.most:  # False for NaN: what is no number
        return annotation(number)
    name = "a whole number" if annotation is int else "a number"
    bounds = "" if spec.above is None else f" above {spec.above:g}"
    if spec.least > -math.inf and spec.most < math.inf:
        bounds = f" from {spec.least:g} to {spec.most:g}"
    elif spec.least > -math.inf:
        bounds = f", at least {spec.least:g}"
    raise ValueError(f"must be {name}{bounds}")


def _parse_number(text: str, annotation: type) -> float:
    """The number that a text spells; NaN for any other text, which lies within no bounds."""
    # `int()` and `float()` would also take `1_000`, `inf` and blanks. 18 digits fit into 64 bits.
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if annotation is float and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        try:
            return float(text)
        except ValueError:  # several points, or none but points
            return math.nan
    return math.nan


def _check_choice(text: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError with the choices unless the typed text is one of them."""
    if text not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{did_you_mean(text, choices)}")


def _field_with_spec(default: Any, spec: ArgumentSpec) -> Any:
    """A dataclass field with this default that carries its `ArgumentSpec` as metadata."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={_SPEC: spec})
    return field(default=default, metadata={_SPEC: spec})


def specs(declaration: type[VerbArguments]) -> dict[str, ArgumentSpec]:
    """The `ArgumentSpec` of each field of a declaration, with the key as it is typed. Lists of words have no key."""
    specs_by_name = {}
    for declared in fields(declaration):
        spec: ArgumentSpec | None = declared.metadata.get(_SPEC)
        if spec is None:
            continue
        key = spec.key
        if spec.kind == "option" and not key:
            key = declared.name
        elif spec.kind == "flag" and not key:
            key = "--" + declared.name.replace("_", "-")
        specs_by_name[declared.name] = replace(spec, key=key)
    return specs_by_name


def _default_of(declared: Field[Any]) -> Any:
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def _default_text(default: Any) -> str:
    """The default of a setting as it would be typed, for `--help`."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Enum):
        return default.name
    if isinstance(default, list):
        return f"[{','.join(default)}]"
    return f"{default:g}" if isinstance(default, float) else str(default)


class _ArgumentReader:
    """Takes one argument after the other, and notes what is wrong with each."""

    def __init__(self, verb: str, declaration: type[Any]) -> None:
        self.verb = verb
        self.declaration = declaration
        self.specs = specs(declaration)
        self.annotations = get_type_hints(declaration)
        self.field_by_key: dict[str, str] = {}
        """The field's name by each spelling of its key."""
        for name, spec in self.specs.items():
            for key in (spec.key, *spec.also):
                if key:
                    self.field_by_key[key] = name
        self.typed: dict[str, str] = {}
        """The text of each argument, by the name of its field."""
        self.flags: set[str] = set()
        """Fields of the flags that were typed."""
        self.empty: set[str] = set()
        """Fields whose words were typed without a value: that is one problem, and "not set" would be a second."""
        self.bare: list[str] = []
        """Arguments without an equals sign."""
        self.settings: list[str] = []
        """Arguments that are not the verb's own, and that it hands on, such as the settings of a run."""
        self.problems: list[str] = []
        """A message for each argument that cannot be used."""

    def join_dashed_values(self, argv: list[str]) -> Iterator[str]:
        """The arguments, with a dashed argument and its value joined: for a shell `--shard 0/8` and `--cfg job` are two each."""
        while argv:
            argument = argv.pop(0)
            name = self.field_by_key.get(argument)
            if name is None or self.specs[name].kind != "option" or not argument.startswith("-"):
                yield argument
                continue
            choices = self.specs[name].choices
            annotation = self.annotations[name]
            is_switch = annotation is bool or bool in get_args(annotation)
            value = ""
            if is_switch:
                value = "true"
            elif choices and not (argv and argv[0] in choices):
                value = choices[0]  # such an argument may stand alone
            elif argv:
                value = argv.pop(0)
            yield f"{argument}={value}"

    def add(self, argument: str) -> None:
        """Take one argument: as the verb's own flag, `key=value` or argument without `=`, to hand on, or as a problem."""
        key, assigned, text = argument.partition("=")
        name = self.field_by_key.get(key)
        kind = self.specs[name].kind if name is not None else ""
        # A file or directory whose name looks like an argument is meant as a file: people type what is there.
        if name is not None and kind == "flag" and not assigned:
            self.flags.add(name)
        elif name is not None and kind in ("option", "positional") and (assigned or not _exists(argument)):
            self._add_own_argument(name, argument, text)
        elif argument.startswith("-") and argument != "-":
            self._add_unknown_flag(argument)
        elif LOOKS_LIKE_KEY.match(argument) and not _exists(argument):
            self._add_unknown_key(argument)
        elif self._fields_of_kind("positional"):
            self.bare.append(argument)
        else:
            self._add_unknown_key(argument)

    def finish(self) -> tuple[Any, list[str]]:
        """Convert everything that was read; returns (the object of the declared class, the problems)."""
        self._place_positionals()
        values: dict[str, Any] = dict.fromkeys(self.flags, True)
        for name, text in self.typed.items():
            spec = self.specs[name]
            try:
                values[name] = parse_value(text, self.annotations[name], spec)
            except ValueError as error:
                self.problems.append(f"{spec.key}={text}: {error}")
        for name in self._fields_of_kind("settings"):
            values[name] = self.settings
        for name in self._fields_of_kind("positional"):
            annotation = self.annotations[name]
            if get_origin(annotation) is list:
                (entry_type,) = get_args(annotation)
                values[name] = [parse_value(entry, entry_type) for entry in self.bare]
        for name in self.specs:
            self._check_needed_arguments(name)
        typed_by_key = {self.specs[name].key: text for name, text in self.typed.items()}
        return self.declaration(typed=typed_by_key, **values), self.problems

    def _check_needed_arguments(self, name: str) -> None:
        """Add a problem if the argument of field `name` is required and missing, or typed without the one that it goes with."""
        spec = self.specs[name]
        is_typed = name in self.typed or name in self.flags
        if spec.required and not is_typed and name not in self.empty:
            self.problems.append(f"{spec.key}: not set; {spec.required}")
        if spec.needs and is_typed and not self._is_typed(spec.needs):
            typed_argument = spec.key if spec.kind == "flag" else f"{spec.key}={self.typed[name]}"
            needed_argument = self._needed_argument(spec.needs)
            self.problems.append(f"{typed_argument}: goes with {needed_argument}; add that, or leave {spec.key} out")

    def _fields_of_kind(self, kind: str) -> list[str]:
        """The names of the fields whose `ArgumentSpec` is of this kind, in the order of their declaration."""
        return [name for name, spec in self.specs.items() if spec.kind == kind]

    def _add_own_argument(self, name: str, argument: str, text: str) -> None:
        """Keep the value of one of the verb's own words; without a value, or a second time, it is a problem."""
        key = self.specs[name].key
        if not text.strip():
            example = self.specs[name].like or "..."
            self.empty.add(name)
            self.problems.append(f"{argument}: {key} needs a value, as in {key}={example}")
        elif name in self.typed:
            before = self.typed[name]
            self.problems.append(f"{argument}: {key} is given twice, as {before} and {text}; give one of the two")
        else:
            self.typed[name] = text

    def _add_unknown_flag(self, argument: str) -> None:
        """Put a flag that the verb does not know into `settings`, if the verb hands such flags on; else it is a problem."""
        for name in self._fields_of_kind("settings"):
            # `--model.path=x` is a setting with dashes: whoever reads settings says how it is typed.
            is_setting = "=" in argument and not self.specs[name].beginning
            if self.specs[name].and_flags or is_setting:
                self.settings.append(argument)
                return
        flags = [spec.key for spec in self.specs.values() if spec.key.startswith("-")]
        known_flags = f"{', '.join(flags)} and --help" if flags else "--help"
        hint = did_you_mean(argument, [*flags, "--help"]) or f"; {self.verb} takes {known_flags}"
        self.problems.append(f"{argument}: there is no such flag{hint}")

    def _add_unknown_key(self, argument: str) -> None:
        """Put an argument of unknown key into `settings`, if the verb hands those on and it is not mistyped; else a problem."""
        key = argument.partition("=")[0]
        own_keys = []
        for spec in self.specs.values():
            if spec.kind == "option" and not spec.key.startswith("-"):
                own_keys.append(spec.key)
        may_be_misspelt = "." not in key and key not in choices_by_group()
        is_misspelt = may_be_misspelt and difflib.get_close_matches(key, own_keys, cutoff=0.85)
        beginnings = [self.specs[name].beginning for name in self._fields_of_kind("settings")]
        if not is_misspelt and any(argument.startswith(beginning) for beginning in beginnings):
            self.settings.append(argument)
            return
        known_arguments = [f"{own_key}=" for own_key in own_keys] + [f"{beginning}*" for beginning in beginnings]
        hint = did_you_mean(key, own_keys, end="=")
        if not hint:
            hint = f"; {self.verb} takes {', '.join(known_arguments) or 'none'}"
        self.problems.append(f"{argument}: there is no such word{hint}")

    def _place_positionals(self) -> None:
        """Assign arguments without `=` to the fields that take one; the rest is for the field of a list, or else a problem."""
        placed: list[str] = []
        takes_rest = False
        for name in self._fields_of_kind("positional"):
            if get_origin(self.annotations[name]) is list:
                takes_rest = True
                continue
            if name not in self.typed and self.bare:
                self.typed[name] = self.bare.pop(0)
            placed.append(name)
        if self.bare and not takes_rest:
            advice = self.specs[placed[-1]].text
            arguments = [self.typed[name] for name in placed if name in self.typed] + self.bare
            self.problems.append(f"{' '.join(arguments)}: {advice}")

    def _is_typed(self, needs: str) -> bool:
        """Whether an argument that another one needs was typed. `needs`: its key, or a beginning such as `to=hub:`."""
        key, _, beginning = needs.partition("=")
        name = self.field_by_key.get(key)
        if name is not None:
            return name in self.typed and self.typed[name].startswith(beginning)
        return any(setting.startswith(f"{key}={beginning}") for setting in self.settings)

    def _needed_argument(self, needs: str) -> str:
        """An argument that another one needs, as it is typed, for messages."""
        name = self.field_by_key.get(needs)
        if name is None:
            return needs if "=" in needs else f"{needs}=..."
        spec = self.specs[name]
        return "a run" if spec.kind == "positional" else f"{spec.key}={spec.like or '...'}"
