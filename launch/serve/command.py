"""`shardtune serve`: an exported model behind an OpenAI-compatible address."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    positional,
    read_arguments,
    read_setting_group,
    setting_group_help_rows,
)
from launch.output import print_json
from launch.serve.config import ServeConfig
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.exported import ExportedModel

ServingEngine = Literal["vllm", "transformers"]
"""What computes the answers."""


@dataclass(kw_only=True)
class ServeArguments(VerbArguments):
    """The command-line arguments of `shardtune serve`."""

    export: str = positional("give one run or export, as in shardtune serve runs/x")
    accept: list[str] = option(
        "use the adapter on another base model than that of its training",
        default=[],
        example="[base]",
        choices=("base",),
    )
    settings: list[str] = forwarded_settings(required_prefix="serve.")
    dry_run: bool = flag("show what would be started, and start nothing")
    print_only: bool = flag("print the commands that serve the model with vLLM and with SGLang", key="--print")
    as_json: bool = flag("print the answer of --dry-run or --print as JSON, for a script", key="--json")


USAGE = f"""usage: shardtune serve <run or export> [serve.<name>=...] [--dry-run] [--print] [--json]

  shardtune serve runs/first
  SERVE_KEY=... shardtune serve runs/first serve.host=0.0.0.0 serve.port=8080 serve.key_env=SERVE_KEY

serve offers one exported model at an OpenAI-compatible address: /v1/chat/completions, /v1/completions, /v1/models and
/health. If vLLM is installed, or serve.python names a Python that has it, vLLM computes the answers; if not, the
server of transformers does. By default only this machine can reach it (127.0.0.1).

{help_rows(ServeArguments, setting_group_help_rows("serve", ServeConfig))}"""


def main(argv: list[str]) -> int:
    """Run `shardtune serve` with the arguments `argv`: serve an export until a signal comes, or show how; returns the exit code.

    If vLLM serves it, it replaces this process, and nothing is returned. Raises ConfigError.
    """
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    # Read the command line.
    arguments, problems = read_arguments("serve", ServeArguments, argv)
    if any(setting.startswith("serve.key=") for setting in arguments.settings):
        problems.append(
            "serve.key: a key on a command line can be read by everybody on this machine; put it into a variable, as SERVE_KEY, "
            "and set serve.key_env=SERVE_KEY"
        )
    # Without the key, which the group does not have, so that the problem above is the only one about it.
    settings = [setting for setting in arguments.settings if not setting.startswith("serve.key=")]
    config, _, unreadable_value_problems = read_setting_group("serve", ServeConfig(), settings, refuse_repeated=True)
    # Values are checked against each other only once each can be read.
    problems += unreadable_value_problems or config.problems()
    if problems:
        raise ConfigError(problems)
    from launch.serve.exported import check_base_of_export, find_export
    from launch.serve.vllm_environment import find_vllm_python

    exported = find_export(arguments.export)
    for line in check_base_of_export(exported, accept="base" in arguments.accept):
        print(f"accepted: base: {line}", file=sys.stderr, flush=True)
    if config.python is not None:
        config.python = find_vllm_python(config.python)  # the full path
    engine = choose_engine(config, exported)
    if arguments.dry_run or arguments.print_only or arguments.as_json:
        print_serve_plan(exported, config, engine, arguments)
        return 0
    if engine == "vllm":
        replace_process_by_vllm(exported, config)
    from launch.serve.app import check_server_packages
    from launch.serve.run import serve

    check_server_packages()
    serve(exported, config)
    return 0


def choose_engine(config: ServeConfig, exported: ExportedModel) -> ServingEngine:
    """Decide what computes the answers of a served export: vLLM if it can, else the server of transformers.

    `config.python`: a Python that has vLLM; None for this one.

    - serve.engine=transformers: that;
    - vLLM is requested by serve.engine=vllm or serve.python: vLLM;
    - neither: vLLM if it is installed and can serve this export, else transformers.
    Raises ConfigError if vLLM is requested, and is not installed or cannot serve this adapter.
    """
    from launch.serve.other_servers import vllm_command

    if config.engine == "transformers":
        return "transformers"
    is_vllm_installed = config.python is not None
    if config.python is None:
        is_vllm_installed = find_spec("vllm") is not None and shutil.which("vllm") is not None
    is_vllm_requested = config.engine == "vllm" or config.python is not None
    can_serve_export = vllm_command(exported, config) is not None
    if is_vllm_requested and not is_vllm_installed:
        raise ConfigError(
            "serve.engine=vllm: vLLM is not installed in this environment, and its releases up to 0.32 ask for an older "
            "transformers than shardtune; install it in an environment of its own and set serve.python=<its Python>, or set "
            "serve.engine=transformers"
        )
    if is_vllm_requested and not can_serve_export:
        raise ConfigError(
            f"serve.engine=vllm: vLLM takes no {exported.settings.get('peft_type', 'such')} adapter; export with merge=true, or "
            "serve.engine=transformers"
        )
    return "vllm" if is_vllm_installed and can_serve_export else "transformers"


def print_serve_plan(
    exported: ExportedModel, config: ServeConfig, engine: ServingEngine, arguments: ServeArguments
) -> None:
    """Show what `serve` would start, and start nothing: as JSON (`--json`), as commands (`--print`), else in a sentence.

    The commands are those of vLLM and SGLang, which serve the export without shardtune.
    """
    from launch.serve.other_servers import as_shell_command, compute_type_name, sglang_command, vllm_command

    # Values of "vllm" and "sglang": the command as text, "" if the server does not take the adapter.
    plan = {
        "model": config.name or exported.name,
        "directory": str(exported.path),
        "base": exported.base,
        "engine": engine,
        "dtype": compute_type_name(exported, config),
        "address": f"http://{config.host}:{config.port}/v1",
        "key": config.key_env,
        "vllm": as_shell_command(vllm_command(exported, config)),
        "sglang": as_shell_command(sglang_command(exported, config)),
    }
    if arguments.as_json:
        print_json(plan)
    elif arguments.print_only:
        for name in ("vllm", "sglang"):
            print(plan[name] or f"# {name} takes no such adapter; export with merge=true")
    else:
        base_text = f" on {exported.base}" if exported.base else ""
        key_text = f"the key in {config.key_env}" if config.key_env else "no key"
        dtype_text = "" if plan["dtype"] == "auto" else f" in {plan['dtype']}"
        print(
            f"would serve {plan['model']} ({exported.path}{base_text}) at {plan['address']} "
            f"with {engine}{dtype_text}, {key_text}"
        )


def replace_process_by_vllm(exported: ExportedModel, config: ServeConfig) -> NoReturn:
    """Serve an export with vLLM: this process becomes vLLM's server (`exec`), so that signals reach it; never returns.

    Our middleware stands in front of all its addresses.
    """
    from launch.serve.other_servers import as_shell_command, compute_type_name, vllm_command, vllm_environment
    from launch.serve.vllm_environment import create_gateway_directory

    command = vllm_command(exported, config, with_middleware=True)
    assert command is not None  # `choose_engine` made sure
    environment = os.environ | vllm_environment(exported, config)
    # That Python does not see this environment's packages, and must import our middleware.
    if config.python is not None:
        environment["PYTHONPATH"] = str(create_gateway_directory())
    print(f"computes in {compute_type_name(exported, config)} (serve.dtype)", flush=True)
    print(f"starting {as_shell_command(command)}", flush=True)
    os.execvpe(command[0], command, environment)


def print_serve_commands(directory: Path) -> None:
    """Tell the user after an export how to serve it: the commands of shardtune, vLLM and SGLang, as far as each can.

    Nothing is printed for a classifier or an encoder-decoder model, which no server here takes.
    """
    from launch.serve.exported import find_export
    from launch.serve.other_servers import as_shell_command, sglang_command, vllm_command

    try:
        exported = find_export(str(directory))
    except ConfigError:  # a classifier, or an encoder-decoder model
        return
    print(f"serve:  shardtune serve {directory}")
    commands = {"vLLM": vllm_command(exported, ServeConfig()), "SGLang": sglang_command(exported, ServeConfig())}
    for name, command in commands.items():
        if command is not None:
            print(f"{name + ':':<8}{as_shell_command(command)}")
