"""Writes shell completion scripts. They contain verbs, settings, choices and values, so a Tab starts no process."""

from __future__ import annotations

from enum import Enum

from launch.config.choices import groups
from launch.config.user_files import CHOSEN_BY_NAME
from launch.config.verb_words import VerbWords, specs
from strategies.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
PATHS = "model.path|model.tokenizer|data.path|data.eval_path|data.test_path|run.dir|run.resume|tuning.from|to|from"
COMMON_FLAGS = ("--help", "--config-dir")
"""Flags that are read before the verb."""

BASH = r"""# Completion of shardtune in bash. Written by: shardtune --shell-completion bash
_shardtune() {
    local line="${COMP_LINE:0:COMP_POINT}" word verb candidates key
    word="${line##*[[:space:]]}"
    read -r _ verb _ <<<"$line "
    if [[ "$line" != *[[:space:]]*[[:space:]]* ]]; then
        COMPREPLY=($(compgen -W "@VERBS@ --help --version" -- "$word"))
        return
    fi
    compopt +o nospace 2>/dev/null
    case "$word" in
        -*) COMPREPLY=($(compgen -W "@FLAGS@" -- "$word")); return ;;
        @PATHS@=*) COMPREPLY=($(compgen -f -- "${word#*=}")); compopt -o filenames 2>/dev/null; return ;;
        *=*)
            key="${word%%=*}"
            case "$key" in
@VALUES@
                *) candidates="" ;;
            esac
            COMPREPLY=($(compgen -W "$candidates" -- "${word#*=}"))
            return ;;
    esac
    compopt -o nospace 2>/dev/null
    case "$verb" in
@OWN@
        *) candidates="" ;;
    esac
    COMPREPLY=($(compgen -S = -W "@KEYS@ $candidates" -- "$word"))
    case "$verb" in
        status|logs|stop|export|serve|chat|compare) COMPREPLY+=($(compgen -d -- "$word")) ;;
    esac
    COMPREPLY+=($(compgen -f -X '!*.yaml' -- "$word") $(compgen -f -X '!*.yml' -- "$word"))
}
complete -F _shardtune shardtune
"""
ZSH = r"""#compdef shardtune
# Completion of shardtune in zsh. Written by: shardtune --shell-completion zsh
_shardtune() {
    local word="${words[CURRENT]}" key candidates
    local -a verbs keys values flags
    verbs=(@VERBS@ --help --version)
    flags=(@FLAGS@)
    keys=(@KEYS@)
    if (( CURRENT == 2 )); then
        compadd -- $verbs
        return
    fi
    case "$word" in
        -*) compadd -- $flags; return ;;
        (@PATHS@)=*) compset -P '*='; _files; return ;;
        *=*)
            key="${word%%=*}"
            case "$key" in
@VALUES@
                *) candidates="" ;;
            esac
            compset -P '*='
            values=(${=candidates})
            compadd -- $values
            return ;;
    esac
    case "${words[2]}" in
@OWN@
        *) candidates="" ;;
    esac
    keys+=(${=candidates})
    compadd -S '' -- ${^keys}=
    _files -g '*.y(a|)ml'
    [[ "${words[2]}" == (status|logs|stop|export|serve|chat|compare) ]] && _files -/
}
compdef _shardtune shardtune 2>/dev/null
"""


def script(shell: str, verbs: dict[str, str], declared: dict[str, list[type[VerbWords]]]) -> str:
    """The script of a shell, to be loaded by it. Errors: ConfigError.

    `verbs` with what each does, `declared` with the classes that say which words and flags each takes.
    """
    shell = shell.removeprefix("install=")
    if shell not in SHELLS:
        raise ConfigError(f"--shell-completion {shell}: give one of {', '.join(SHELLS)}")
    values_by_key = values_of_settings()
    if shell == "fish":
        return _fish(values_by_key, verbs, declared)
    value_cases = "\n".join(
        f'                {key}) candidates="{" ".join(values)}" ;;' for key, values in values_by_key.items() if values
    )
    word_cases = "\n".join(
        f'        {verb}) candidates="{" ".join(keys_of(classes))}" ;;' for verb, classes in declared.items()
    )
    text = BASH if shell == "bash" else ZSH
    for mark, content in (
        ("@VERBS@", " ".join(verbs)),
        ("@FLAGS@", " ".join(flags_of(declared))),
        ("@OWN@", word_cases),
        ("@PATHS@", PATHS if shell == "zsh" else "=*|".join(PATHS.split("|"))),
        ("@VALUES@", value_cases),
        ("@KEYS@", " ".join(values_by_key)),
    ):
        text = text.replace(mark, content)
    return text


def keys_of(classes: list[type[VerbWords]]) -> list[str]:
    """The keys that stand before an equals sign."""
    keys = []
    for declaration in classes:
        keys += [
            spec.key for spec in specs(declaration).values() if spec.kind == "word" and not spec.key.startswith("-")
        ]
    return keys


def flags_of(declared: dict[str, list[type[VerbWords]]]) -> list[str]:
    """All that begins with a dash, of all verbs."""
    flags = [*COMMON_FLAGS]
    for classes in declared.values():
        for declaration in classes:
            for spec in specs(declaration).values():
                flags += [key for key in (spec.key, *spec.also) if key.startswith("-")]
    return list(dict.fromkeys(flags))


def values_of_settings() -> dict[str, list[str]]:
    """Every group and setting as typed, with the values it takes where they can be listed."""
    from launch.config.overrides import settings

    values_by_key: dict[str, list[str]] = {group: list(choices) for group, choices in groups().items()}
    for key, setting in settings().items():
        name = key.removesuffix("_")
        if "*" in name or (name.endswith(".name") and name.split(".")[0] in CHOSEN_BY_NAME):
            continue
        values: list[str] = []
        if isinstance(setting.type, type) and issubclass(setting.type, Enum):
            values = [member.name for member in setting.type]
        elif setting.type is bool or setting.type == bool | None:
            values = ["true", "false"]
        values_by_key[name] = values
    return values_by_key


def _fish(
    values_by_key: dict[str, list[str]], verbs: dict[str, str], declared: dict[str, list[type[VerbWords]]]
) -> str:
    lines = [
        "# Completion of shardtune in fish. Written by: shardtune --shell-completion fish",
        "complete -c shardtune -f",
    ]
    for verb, text in verbs.items():
        description = text.replace("'", "\\'")
        lines.append(f"complete -c shardtune -n __fish_use_subcommand -a {verb} -d '{description}'")
    lines.append("function __shardtune_words")
    lines.append("    set -l word (commandline -ct)")
    lines.append("    switch $word")
    lines.append(f"        case {' '.join(chr(39) + key + '=*' + chr(39) for key in PATHS.split('|'))}")
    lines.append("            set -l parts (string split -m 1 = -- $word)")
    lines.append("            for each in (__fish_complete_path $parts[2])")
    lines.append("                echo $parts[1]=$each")
    lines.append("            end")
    for key, options in values_by_key.items():
        if options:
            lines.append(f"        case '{key}=*'")
            lines.append(f"            printf '%s\\n' {' '.join(f'{key}={value}' for value in options)}")
    lines.append("        case '*'")
    lines.append(f"            printf '%s\\n' {' '.join(f'{key}=' for key in values_by_key)}")
    lines.append("            __fish_complete_suffix .yaml")
    lines += ["    end", "end"]
    lines.append("complete -c shardtune -n 'not __fish_use_subcommand' -a '(__shardtune_words)'")
    for verb, classes in declared.items():
        if keys := keys_of(classes):
            words = " ".join(f"{key}=" for key in keys)
            lines.append(f"complete -c shardtune -n '__fish_seen_subcommand_from {verb}' -a '{words}'")
    lines += [
        f"complete -c shardtune -n 'not __fish_use_subcommand' -l {flag.removeprefix('--')}"
        for flag in flags_of(declared)
        if flag.startswith("--")
    ]
    return "\n".join(lines) + "\n"
