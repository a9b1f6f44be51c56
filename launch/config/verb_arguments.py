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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from launch.config.argument_values import ArgumentSpec, parse_value, suggestion_of_similar_name
from launch.config.choices import choices_by_group

KEY_AND_EQUALS_SIGN_REGEX = re.compile(r"[+~]{0,2}[a-z_][\w./@*-]*=")
"""The start of `key=value`. An address has a colon before its `=`, a sentence a capital or spaces: both are positional."""
MAX_ALIGNED_HEAD_COLUMNS = 28
"""Columns of an argument in `--help` up to which its text is lined up with that of the others."""
_SPEC = "spec"
Config = TypeVar("Config")


@dataclass(kw_only=True)
class VerbArguments:
    """Base class of the dataclasses in which verbs declare the arguments that they take."""

    text_by_key: dict[str, str] = field(default_factory=dict)
    """The text of each argument that was typed, by its key, without flags and the entries of a list of positional arguments."""


Declared = TypeVar("Declared", bound=VerbArguments)


def option(text: str, *, default: Any = None, **details: Any) -> Any:
    """An argument `key=value`. `details`: the fields of `ArgumentSpec`."""
    return _field_with_spec(default, ArgumentSpec(kind="option", text=text, **details))


def flag(text: str, **details: Any) -> Any:
    """A switch such as `--dry-run`, which changes the answer alone. `details`: `key`, `aliases` and `needs` of `ArgumentSpec`."""
    return _field_with_spec(False, ArgumentSpec(kind="flag", text=text, **details))


def positional(advice: str, *, required: bool = True, key: str = "run.dir") -> Any:
    """An argument without an equals sign, for which `key=` says the same. `advice`: what to name, if there are more, or none."""
    return _field_with_spec(
        None, ArgumentSpec(kind="positional", text=advice, key=key, advice_if_missing=advice if required else "")
    )


def positionals() -> Any:
    """The list of all positional arguments behind those that have fields of their own."""
    return _field_with_spec([], ArgumentSpec(kind="positional", text=""))


def forwarded_settings(*, required_prefix: str = "", forwards_unknown_flags: bool = False) -> Any:
    """Declare the field of a verb's arguments that takes what the verb hands on, such as settings of a run, in their order.

    `required_prefix`: only arguments that begin with it are taken, such as `serve.`.
    `forwards_unknown_flags`: whether flags that the verb does not know are handed on, too.
    """
    spec = ArgumentSpec(
        kind="settings", text="", required_prefix=required_prefix, forwards_unknown_flags=forwards_unknown_flags
    )
    return _field_with_spec([], spec)


def read_arguments(verb: str, declaration: type[Declared], argv: Iterable[str]) -> tuple[Declared, list[str]]:
    """Read a verb's command line into an object of the dataclass that declares its arguments.

    `argv`: what stands behind the verb.
    Returns the object, and a problem for each argument that cannot be used; the caller adds its own and raises them together.
    """
    reader = _ArgumentReader(verb, declaration)
    for argument in reader.join_dashed_values(list(argv)):
        reader.read_argument(argument)
    return reader.finished_arguments()


class SettingGroup(NamedTuple, Generic[Config]):
    """The settings of one group that were read from a command line."""

    settings: Config
    other_arguments: list[str]
    """The arguments that are of no setting of the group."""
    problems: list[str]
    """A message for each argument of the group that cannot be used."""


def read_setting_group(
    prefix: str, defaults: Config, arguments: Iterable[str], *, refuse_repeated: bool = False
) -> SettingGroup[Config]:
    """Read the settings of one group from arguments such as `serve.port=80`, for a verb whose settings are none of a run.

    `prefix`: the group, `serve`.
    `defaults`: an object of a dataclass, whose annotations say what the values may be, such as `int | None`; the result has a
        changed copy.
    `refuse_repeated`: whether a setting that is set twice is a problem; otherwise its last value counts, as among the settings of
        a run.
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
        elif refuse_repeated and name in changes:
            problems.append(f"{argument}: {key} is given twice; give one")
        else:
            try:
                changes[name] = _parse_group_value(key, text, annotations[name])
            except ValueError as error:
                problems.append(f"{argument}: {error}")
    # Values of a wrong type are problems, and keep their default.
    changed_settings = replace(defaults, **changes)  # type: ignore[type-var]
    return SettingGroup(changed_settings, other_arguments, problems)


def _parse_group_value(key: str, text: str, annotation: Any) -> Any:
    """Read the text behind `key=` as a value of the annotated type: "80" for `int | None` is 80, "null" is None.

    Raises ValueError with what it must be.
    """
    if not text.strip():
        # As after `serve.port=$PORT` in a shell that has no variable PORT.
        raise ValueError(f"{key} needs a value")
    if text == "null" and type(None) in get_args(annotation):
        return None
    return parse_value(text, annotation)


def verb_arguments_in(module: ModuleType) -> list[type[VerbArguments]]:
    """The classes of verbs' arguments that a module defines or imports."""
    declarations = []
    for member in vars(module).values():
        if isinstance(member, type) and issubclass(member, VerbArguments) and member is not VerbArguments:
            declarations.append(member)
    return declarations


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` or `-h` is among the arguments."""
    return "--help" in argv or "-h" in argv


def help_rows(declaration: type[VerbArguments], extra_rows: Mapping[str, str] | None = None) -> str:
    """Write the rows of a verb's `--help`: one for each option, then `extra_rows`, then one for each flag.

    Such as "  wait_s=600  seconds to wait".
    `declaration`: the class that declares the verb's arguments.
    `extra_rows`: the explanation of each further `key=example`.
    """
    spec_by_field = argument_specs(declaration)
    explanations: dict[str, str] = {}
    for field_name, spec in spec_by_field.items():
        if spec.kind == "option":
            example = spec.example or _default_text(_default_of(declaration.__dataclass_fields__[field_name]))
            separator = " " if spec.key.startswith("-") else "="
            explanations[f"{spec.key}{separator}{example}"] = spec.text
    explanations |= extra_rows or {}
    for spec in spec_by_field.values():
        if spec.kind == "flag":
            explanations[", ".join((spec.key, *spec.aliases))] = spec.text
    # A head that is wider than the column has its text on the next line, and does not widen the column for all.
    width = max((len(head) for head in explanations if len(head) <= MAX_ALIGNED_HEAD_COLUMNS), default=0)
    return "\n".join(f"  {head:<{width}}  {text}" for head, text in explanations.items())


def setting_group_help_rows(prefix: str, settings: type) -> dict[str, str]:
    """Rows of `--help` about the settings of a group, for `help_rows`: {"serve.port=8000": "The port that ..."}.

    `settings`: the dataclass of the group, whose fields have a sentence each in the source.
    """
    from trainer.config.descriptions import direct_field_docstrings

    sentences = direct_field_docstrings(settings)
    rows = {}
    for setting in fields(settings):
        default_text = _default_text(_default_of(setting))
        rows[f"{prefix}.{setting.name}={default_text}"] = sentences[setting.name]
    return rows


def _exists(argument: str) -> bool:
    """Whether an argument names a file or directory; a text too long for a name does not."""
    try:
        return Path(argument).exists()
    except OSError:
        return False


def _field_with_spec(default: Any, spec: ArgumentSpec) -> Any:
    """A dataclass field with this default that carries its `ArgumentSpec` as metadata."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={_SPEC: spec})
    return field(default=default, metadata={_SPEC: spec})


def argument_specs(verb_arguments: type[VerbArguments]) -> dict[str, ArgumentSpec]:
    """How each argument of a verb is typed, by the name of its field in the declaration, with the key filled in.

    A field `dry_run` without a key of its own gets, by the kind of its argument:

    - option: `dry_run`, as in `dry_run=true`;
    - flag: `--dry-run`;
    - positional or settings: none, since they are typed without a key.
    """
    spec_by_field = {}
    for declared_field in fields(verb_arguments):
        spec: ArgumentSpec | None = declared_field.metadata.get(_SPEC)
        if spec is None:
            continue  # `text_by_key`, which the reader fills
        key = spec.key
        if spec.kind == "option" and not key:
            key = declared_field.name
        elif spec.kind == "flag" and not key:
            key = "--" + declared_field.name.replace("_", "-")
        spec_by_field[declared_field.name] = replace(spec, key=key)
    return spec_by_field


def _default_of(declared: Field[Any]) -> Any:
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def _default_text(default: Any) -> str:
    """Write the default of a setting as it would be typed, for `--help`: None as `null`, an enum by its member's name."""
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
    """Reads the arguments of one verb: `read_argument` each in turn, then `finished_arguments` returns them as typed values.

    A field is one of the declaration (`dry_run`), a key is how it is typed (`--dry-run`).
    """

    def __init__(self, verb: str, declaration: type[Any]) -> None:
        """`verb`: its name, for messages. `declaration`: the dataclass whose fields declare its arguments."""
        self.verb = verb
        self.declaration = declaration
        self.spec_by_field = argument_specs(declaration)
        self.annotations = get_type_hints(declaration)
        self.field_by_key: dict[str, str] = {}
        """The field's name by each spelling of its key."""
        for name, spec in self.spec_by_field.items():
            for key in (spec.key, *spec.aliases):
                if key:
                    self.field_by_key[key] = name
        self.text_by_field: dict[str, str] = {}
        """The value of each option or positional argument as it was typed, by the name of its field."""
        self.flag_fields: set[str] = set()
        """The fields of the flags that were typed."""
        self.fields_without_value: set[str] = set()
        """Fields whose keys were typed without a value: that is one problem, and "not set" would be a second."""
        self.positional_texts: list[str] = []
        """Arguments without an equals sign, until `_assign_positional_texts` gives them to their fields."""
        self.forwarded_arguments: list[str] = []
        """Arguments that are not the verb's own, and that it hands on, such as the settings of a run."""
        self.problems: list[str] = []
        """A message for each argument that cannot be used."""

    def join_dashed_values(self, argv: list[str]) -> Iterator[str]:
        """Make one argument of each dashed option and its value: `--shard 0/8` becomes `--shard=0/8`; others stay as they are.

        `argv`: all arguments of the verb.
        The value of a dashed option is:

        - true, if it is a bool;
        - the first of its choices, if it has choices and none of them follows: `--cfg` alone is `--cfg=job`;
        - otherwise the next argument, or empty if there is none.
        """
        unread = list(argv)
        while unread:
            argument = unread.pop(0)
            field_name = self.field_by_key.get(argument)
            spec = self.spec_by_field[field_name] if field_name is not None else None
            if field_name is None or spec is None or spec.kind != "option" or not argument.startswith("-"):
                yield argument
                continue
            annotation = self.annotations[field_name]
            value = ""
            if annotation is bool or bool in get_args(annotation):
                value = "true"
            elif spec.choices and not (unread and unread[0] in spec.choices):
                value = spec.choices[0]
            elif unread:
                value = unread.pop(0)
            yield f"{argument}={value}"

    def read_argument(self, argument: str) -> None:
        """Take one argument of the verb: keep its text for its field, hand it on, or note a problem.

        It is the first of these that applies:

        - a flag of the verb;
        - an option of the verb, or a positional argument with its key, such as `run.dir=runs/a`;
        - an unknown flag, or an unknown `key=value`, which is handed on or becomes a problem;
        - a positional argument, if the verb takes any; otherwise a problem as well.

        A file or directory whose name looks like `key=value` is positional, since people type the names of their files.
        """
        key, has_value, text = argument.partition("=")
        field_name = self.field_by_key.get(key)
        kind = self.spec_by_field[field_name].kind if field_name is not None else ""
        if field_name is not None and kind == "flag" and not has_value:
            self.flag_fields.add(field_name)
        elif field_name is not None and kind in ("option", "positional") and (has_value or not _exists(argument)):
            self._add_own_argument(field_name, argument, text)
        elif argument.startswith("-") and argument != "-":
            self._forward_or_refuse_flag(argument)
        elif KEY_AND_EQUALS_SIGN_REGEX.match(argument) and not _exists(argument):
            self._forward_or_refuse_argument(argument)
        elif self._fields_of_kind("positional"):
            self.positional_texts.append(argument)
        else:
            self._forward_or_refuse_argument(argument)

    def finished_arguments(self) -> tuple[Any, list[str]]:
        """Turn the texts that were read into an object of the verb's declaration; returns it with all problems.

        The problems include arguments that are required and missing. Call this once, after the last argument.
        """
        self._assign_positional_texts()
        values: dict[str, Any] = dict.fromkeys(self.flag_fields, True)
        values |= self._parsed_single_values()
        for field_name in self._fields_of_kind("settings"):
            values[field_name] = self.forwarded_arguments
        for field_name in self._fields_of_kind("positional"):
            annotation = self.annotations[field_name]
            if get_origin(annotation) is list:
                (entry_type,) = get_args(annotation)
                values[field_name] = [parse_value(entry, entry_type) for entry in self.positional_texts]
        for field_name in self.spec_by_field:
            self._check_requirements(field_name)
        text_by_key = {self.spec_by_field[name].key: text for name, text in self.text_by_field.items()}
        return self.declaration(text_by_key=text_by_key, **values), self.problems

    def _parsed_single_values(self) -> dict[str, Any]:
        """Parse the text of each option and single positional argument by the type of its field; values by the field's name.

        A text that is no such value becomes a problem, and its field keeps its default.
        """
        values: dict[str, Any] = {}
        for field_name, text in self.text_by_field.items():
            spec = self.spec_by_field[field_name]
            try:
                values[field_name] = parse_value(text, self.annotations[field_name], spec)
            except ValueError as error:
                self.problems.append(f"{spec.key}={text}: {error}")
        return values

    def _check_requirements(self, field_name: str) -> None:
        """Add a problem if the argument of a field is required and missing, or needs another argument that is missing."""
        spec = self.spec_by_field[field_name]
        is_typed = field_name in self.text_by_field or field_name in self.flag_fields
        if spec.advice_if_missing and not is_typed and field_name not in self.fields_without_value:
            self.problems.append(f"{spec.key}: not set; {spec.advice_if_missing}")
        if spec.needs and is_typed and not self._has_needed_argument(spec.needs):
            typed_argument = spec.key if spec.kind == "flag" else f"{spec.key}={self.text_by_field[field_name]}"
            needed_argument = self._needed_argument_text(spec.needs)
            self.problems.append(f"{typed_argument}: goes with {needed_argument}; add that, or leave {spec.key} out")

    def _fields_of_kind(self, kind: str) -> list[str]:
        """The names of the fields whose `ArgumentSpec` is of this kind, in the order of their declaration."""
        return [name for name, spec in self.spec_by_field.items() if spec.kind == kind]

    def _add_own_argument(self, field_name: str, argument: str, text: str) -> None:
        """Keep the value of one of the verb's own arguments; without a value, or given a second time, it is a problem.

        `argument`: the whole argument as typed, such as `wait_s=60`, and `text`: its value.
        """
        key = self.spec_by_field[field_name].key
        if not text.strip():
            example = self.spec_by_field[field_name].example or "..."
            self.fields_without_value.add(field_name)
            self.problems.append(f"{argument}: {key} needs a value, as in {key}={example}")
        elif field_name in self.text_by_field:
            first_text = self.text_by_field[field_name]
            self.problems.append(f"{argument}: {key} is given twice, as {first_text} and {text}; give one of the two")
        else:
            self.text_by_field[field_name] = text

    def _forward_or_refuse_flag(self, argument: str) -> None:
        """Deal with a flag that the verb does not know: keep it for whom the verb hands such flags on to, or add a problem."""
        for field_name in self._fields_of_kind("settings"):
            spec = self.spec_by_field[field_name]
            # `--model.path=x` is a setting with dashes: whoever reads settings says how it is typed.
            is_setting = "=" in argument and not spec.required_prefix
            if spec.forwards_unknown_flags or is_setting:
                self.forwarded_arguments.append(argument)
                return
        flags = [spec.key for spec in self.spec_by_field.values() if spec.key.startswith("-")]
        known_flags = f"{', '.join(flags)} and --help" if flags else "--help"
        hint = suggestion_of_similar_name(argument, [*flags, "--help"]) or f"; {self.verb} takes {known_flags}"
        self.problems.append(f"{argument}: there is no such flag{hint}")

    def _forward_or_refuse_argument(self, argument: str) -> None:
        """Deal with an argument `key=value` that the verb does not know: keep it if the verb hands it on, or refuse it.

        A verb hands on the arguments that begin with the `required_prefix` of one of its fields. One whose key is nearly that of
        an option of the verb is mistyped, and is a problem in any case.
        """
        key = argument.partition("=")[0]
        own_keys = []
        for spec in self.spec_by_field.values():
            if spec.kind == "option" and not spec.key.startswith("-"):
                own_keys.append(spec.key)
        is_setting_of_run = "." in key or key in choices_by_group()
        is_misspelt = not is_setting_of_run and bool(difflib.get_close_matches(key, own_keys, cutoff=0.85))
        prefixes = [self.spec_by_field[field_name].required_prefix for field_name in self._fields_of_kind("settings")]
        if not is_misspelt and any(argument.startswith(prefix) for prefix in prefixes):
            self.forwarded_arguments.append(argument)
            return
        known_arguments = [f"{own_key}=" for own_key in own_keys] + [f"{prefix}*" for prefix in prefixes]
        hint = suggestion_of_similar_name(key, own_keys, end="=")
        if not hint:
            hint = f"; {self.verb} takes {', '.join(known_arguments) or 'none'}"
        self.problems.append(f"{argument}: there is no such argument{hint}")

    def _assign_positional_texts(self) -> None:
        """Give the arguments without `=` to the fields that take one each, in the order of the fields.

        If there are more, they stay in `positional_texts` for the field that takes a list, or are a problem if there is none.
        """
        single_fields: list[str] = []
        has_list_field = False
        for name in self._fields_of_kind("positional"):
            if get_origin(self.annotations[name]) is list:
                has_list_field = True
                continue
            if name not in self.text_by_field and self.positional_texts:
                self.text_by_field[name] = self.positional_texts.pop(0)
            single_fields.append(name)
        if self.positional_texts and not has_list_field:
            # There is a single field, because `read_argument` keeps such texts only for a verb that takes them. Its text is the
            # advice.
            advice = self.spec_by_field[single_fields[-1]].text
            arguments = [
                self.text_by_field[name] for name in single_fields if name in self.text_by_field
            ] + self.positional_texts
            self.problems.append(f"{' '.join(arguments)}: {advice}")

    def _has_needed_argument(self, needs: str) -> bool:
        """Whether an argument that another one needs was typed. `needs`: its key, or a beginning such as `to=hub:`."""
        key, _, beginning = needs.partition("=")
        name = self.field_by_key.get(key)
        if name is not None:
            return name in self.text_by_field and self.text_by_field[name].startswith(beginning)
        return any(setting.startswith(f"{key}={beginning}") for setting in self.forwarded_arguments)

    def _needed_argument_text(self, needs: str) -> str:
        """An argument that another one needs, as a message shows it: "a run", `to=hub:` or `against=...`."""
        name = self.field_by_key.get(needs)
        if name is None:
            return needs if "=" in needs else f"{needs}=..."
        spec = self.spec_by_field[name]
        return "a run" if spec.kind == "positional" else f"{spec.key}={spec.example or '...'}"
