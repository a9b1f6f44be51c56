"""Writes shell completion scripts. They contain verbs, settings, choices and values, so a Tab starts no process."""

from enum import Enum

from launch.config.choices import choices_by_group
from launch.config.user_files import GROUPS_CHOSEN_BY_NAME
from launch.config.verb_arguments import VerbArguments, argument_specs
from strategies.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
PATH_KEYS = (
    *("model.path", "model.tokenizer", "data.path", "data.eval_path", "data.test_path"),
    *("run.dir", "run.resume", "tuning.from", "to", "from"),
)
"""Keys whose values are files or directories."""
COMMON_FLAGS = ("--help", "--config-dir")
"""Flags that are read before the verb."""

BASH_TEMPLATE = r"""# Completion of shardtune in bash. Written by: shardtune --shell-completion bash
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
ZSH_TEMPLATE = r"""#compdef shardtune
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


def completion_script(shell: str, verbs: dict[str, str], classes_by_verb: dict[str, list[type[VerbArguments]]]) -> str:
    """Write the script that completes shardtune's command line in a shell; all words are in it, so that a Tab starts no process.

    `shell`: `bash`, `zsh` or `fish`, also as `install=bash` (Hydra's way to ask for it).
    `verbs`: the description of each verb, such as `train`.
    `classes_by_verb`: the classes that declare the arguments and flags of each verb.
    Raises ConfigError for another shell.
    """
    shell = shell.removeprefix("install=")
    if shell not in SHELLS:
        raise ConfigError(f"--shell-completion {shell}: give one of {', '.join(SHELLS)}")
    values_by_key = possible_values_by_key()
    if shell == "fish":
        return _fish_script(values_by_key, verbs, classes_by_verb)

    # bash and zsh share the form of their `case` branches: the values of each setting, the arguments of each verb.
    value_cases = []
    for key, values in values_by_key.items():
        if values:
            value_cases.append(f'                {key}) candidates="{" ".join(values)}" ;;')
    argument_cases = []
    for verb, declarations in classes_by_verb.items():
        argument_cases.append(f'        {verb}) candidates="{" ".join(option_keys_of_verb(declarations))}" ;;')

    replacement_by_mark = {
        "@VERBS@": " ".join(verbs),
        "@FLAGS@": " ".join(flags_of_all_verbs(classes_by_verb)),
        "@OWN@": "\n".join(argument_cases),
        # zsh has the alternatives in brackets, `(to|from)=*`; bash has `to=*|from=*`.
        "@PATHS@": ("|" if shell == "zsh" else "=*|").join(PATH_KEYS),
        "@VALUES@": "\n".join(value_cases),
        "@KEYS@": " ".join(values_by_key),
    }
    script_text = BASH_TEMPLATE if shell == "bash" else ZSH_TEMPLATE
    # Marks as `@KEYS@` and not a template engine: a shell script is full of `$`, `{` and `%`.
    for mark, replacement in replacement_by_mark.items():
        script_text = script_text.replace(mark, replacement)
    return script_text


def option_keys_of_verb(declarations: list[type[VerbArguments]]) -> list[str]:
    """The keys of a verb's own `key=value` arguments, such as `wait_s`, for completion; those with dashes are flags there.

    `declarations`: the classes that declare the verb's arguments.
    """
    keys = []
    for declaration in declarations:
        for spec in argument_specs(declaration).values():
            if spec.kind == "option" and not spec.key.startswith("-"):
                keys.append(spec.key)
    return keys


def flags_of_all_verbs(classes_by_verb: dict[str, list[type[VerbArguments]]]) -> list[str]:
    """The flags of all verbs for completion: every argument that begins with a dash, each once.

    `classes_by_verb`: the classes that declare each verb's arguments.
    """
    flags = [*COMMON_FLAGS]
    for declarations in classes_by_verb.values():
        for declaration in declarations:
            for spec in argument_specs(declaration).values():
                flags += [key for key in (spec.key, *spec.aliases) if key.startswith("-")]
    return list(dict.fromkeys(flags))


def possible_values_by_key() -> dict[str, list[str]]:
    """The values that completion offers behind each group and setting, by the key as typed; empty if they cannot be listed.

    {"tuning": ["full", "lora"], "run.must_fit": ["true", "false"], "optim.lr": []}. Left out: settings whose key holds a name of
    the user's (`data.sources.*.path`), and the `name` of a group, which is typed as `<group>=<choice>`.
    """
    from launch.config.known_settings import all_settings

    values_by_key: dict[str, list[str]] = {group: list(choices) for group, choices in choices_by_group().items()}
    for key, setting in all_settings().items():
        name = key.removesuffix("_")  # a field is called `from_` where Python would take `from` for its own word
        is_choice = name.endswith(".name") and name.split(".")[0] in GROUPS_CHOSEN_BY_NAME
        if "*" in name or is_choice:
            continue
        values_by_key[name] = []
        if isinstance(setting.type, type) and issubclass(setting.type, Enum):
            values_by_key[name] = [member.name for member in setting.type]
        elif setting.type is bool or setting.type == bool | None:
            values_by_key[name] = ["true", "false"]
    return values_by_key


def _fish_script(
    values_by_key: dict[str, list[str]], verbs: dict[str, str], classes_by_verb: dict[str, list[type[VerbArguments]]]
) -> str:
    """Write the completion script for fish: a function that prints the candidates for the word under the cursor.

    `values_by_key`: possible values of each setting.
    `verbs`: one line of help for each verb.
    `classes_by_verb`: the declarations of the verb's own arguments, by verb.
    """
    # Verbs, with their help.
    lines = [
        "# Completion of shardtune in fish. Written by: shardtune --shell-completion fish",
        "complete -c shardtune -f",
    ]
    for verb, text in verbs.items():
        description = text.replace("'", "\\'")
        lines.append(f"complete -c shardtune -n __fish_use_subcommand -a {verb} -d '{description}'")
    # The function: files after keys of paths, else values of the key, else keys.
    path_patterns = " ".join(f"'{key}=*'" for key in PATH_KEYS)
    lines += [
        "function __shardtune_words",
        "    set -l word (commandline -ct)",
        "    switch $word",
        f"        case {path_patterns}",
        "            set -l parts (string split -m 1 = -- $word)",
        "            for each in (__fish_complete_path $parts[2])",
        "                echo $parts[1]=$each",
        "            end",
    ]
    for key, values in values_by_key.items():
        if values:
            lines.append(f"        case '{key}=*'")
            lines.append(f"            printf '%s\\n' {' '.join(f'{key}={value}' for value in values)}")
    lines += [
        "        case '*'",
        f"            printf '%s\\n' {' '.join(f'{key}=' for key in values_by_key)}",
        "            __fish_complete_suffix .yaml",
        "    end",
        "end",
        "complete -c shardtune -n 'not __fish_use_subcommand' -a '(__shardtune_words)'",
    ]
    # Arguments of single verbs, and flags.
    for verb, declarations in classes_by_verb.items():
        keys = option_keys_of_verb(declarations)
        if keys:
            arguments = " ".join(f"{key}=" for key in keys)
            lines.append(f"complete -c shardtune -n '__fish_seen_subcommand_from {verb}' -a '{arguments}'")
    for flag in flags_of_all_verbs(classes_by_verb):
        if flag.startswith("--"):
            lines.append(f"complete -c shardtune -n 'not __fish_use_subcommand' -l {flag.removeprefix('--')}")
    return "\n".join(lines) + "\n"
