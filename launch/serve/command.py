"""`shardtune serve`: an exported model behind an OpenAI-compatible address."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.help_text import show_help
from launch.output import FLAG, give
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.serve.config import ServeConfig
    from launch.serve.exported import Exported

USAGE = """usage: shardtune serve <run or export> [serve.<name>=...] [--dry-run] [--print] [--json]

  shardtune serve runs/first
  SERVE_KEY=... shardtune serve runs/first serve.host=0.0.0.0 serve.port=8080 serve.key_env=SERVE_KEY

One model, at /v1/chat/completions, /v1/completions, /v1/models and /health; vLLM computes where it is installed, else
transformers' own server. It listens on 127.0.0.1 unless told otherwise.

  serve.host=127.0.0.1    others can reach any other address, and must send a key
  serve.port=8000         0 takes a free one
  serve.key_env=null      name of the environment variable with the key clients must send
  serve.name=null         what clients call the model; null: the run's name
  serve.engine=auto       auto, transformers, vllm
  serve.max_tokens=1024   most new tokens of an answer, and how many where none are asked for
  serve.max_requests=256  answered or waiting at a time; more are told to try later (429)
  serve.max_body_kib=1024 largest request
  serve.batching=false    many answers at once (transformers); sampled as the export says, whatever a request says
  serve.device=auto  serve.dtype=auto

  accept=[base]           serve an adapter on another base than it was trained on

  --dry-run   say what would be started, and start nothing
  --print     the commands that serve it with vLLM and SGLang
  --json      both, for a script"""
FLAGS = ("--dry-run", "--print", FLAG)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    from launch.export.words import ACCEPT, accepted_kinds, parse
    from launch.serve.config import ServeConfig, read_words
    from launch.serve.exported import compare_base, find_export

    flags = {word for word in argv if word in FLAGS}
    keys = ("run.dir", ACCEPT, *(f"serve.{field.name}" for field in fields(ServeConfig)))
    words, problems = parse([word for word in argv if word not in FLAGS and not word.startswith("serve.key=")], keys)
    if any(word.startswith("serve.key=") for word in argv):
        problems.append(
            "serve.key: a key on a command line can be read by everybody on this machine; put it into a variable, as SERVE_KEY, "
            "and set serve.key_env=SERVE_KEY"
        )
    config, more = read_words(words)
    if problems := [*problems, *more]:
        raise ConfigError(problems)
    if "run.dir" not in words:
        raise ConfigError("nothing to serve is named; give a run or an export, as in shardtune serve runs/x")
    exported = find_export(words["run.dir"])
    accept = bool(accepted_kinds(words, reads_rows=False))
    for line in compare_base(exported, accept=accept):
        print(f"accepted: base: {line}", file=sys.stderr, flush=True)
    engine = chosen_engine(config, exported)
    if flags:
        return tell(exported, config, engine, flags)
    if engine == "vllm":
        return start_vllm(exported, config)
    from launch.serve.app import check_packages
    from launch.serve.run import serve

    check_packages()
    serve(exported, config)
    return 0


def chosen_engine(config: ServeConfig, exported: Exported) -> str:
    """`vllm` or `transformers`. Raises ConfigError where the one asked for is not here, or cannot do what is asked."""
    from launch.serve.other_servers import vllm

    if config.engine == "transformers":
        return "transformers"
    there = find_spec("vllm") is not None and shutil.which("vllm") is not None
    takes = vllm(exported, config) is not None
    if config.engine == "vllm" and not there:
        raise ConfigError(
            "serve.engine=vllm: vLLM is not installed in this environment, and its releases up to 0.32 ask for an older "
            "transformers than shardtune; install it in an environment of its own, and start there what --print shows, or set "
            "serve.engine=transformers"
        )
    if config.engine == "vllm" and not takes:
        raise ConfigError(
            f"serve.engine=vllm: vLLM takes no {exported.settings.get('peft_type', 'such')} adapter; export with merge=true, or "
            "serve.engine=transformers"
        )
    return "vllm" if there and takes else "transformers"


def tell(exported: Exported, config: ServeConfig, engine: str, flags: set[str]) -> int:
    """What would be started, and how others would serve it."""
    from launch.serve.other_servers import sglang, shown, vllm

    told = {
        "model": config.name or exported.name,
        "directory": str(exported.path),
        "base": exported.base,
        "engine": engine,
        "address": f"http://{config.host}:{config.port}/v1",
        "key": config.key_env,
        "vllm": shown(vllm(exported, config)),
        "sglang": shown(sglang(exported, config)),
    }
    if FLAG in flags:
        give(told)
        return 0
    if "--print" in flags:
        for name in ("vllm", "sglang"):
            print(told[name] or f"# {name} takes no such adapter; export with merge=true")
        return 0
    base = f" on {exported.base}" if exported.base else ""
    key = f"the key in {config.key_env}" if config.key_env else "no key"
    print(f"would serve {told['model']} ({exported.path}{base}) at {told['address']} with {engine}, {key}")
    return 0


def start_vllm(exported: Exported, config: ServeConfig) -> int:
    """Become vLLM, with our door in front of all its addresses."""
    from launch.serve.other_servers import environment, shown, vllm

    words = vllm(exported, config, door=True)
    assert words is not None
    print(f"starting {shown(words)}", flush=True)
    os.execvpe(words[0], words, {**os.environ, **environment(exported, config)})


def print_lines(directory: Path) -> None:
    """How to serve what was exported, where it writes text."""
    from launch.serve.config import ServeConfig
    from launch.serve.exported import find_export
    from launch.serve.other_servers import sglang, shown, vllm

    try:
        exported = find_export(str(directory))
    except ConfigError:  # a classifier, or an encoder-decoder model
        return
    print(f"serve:  shardtune serve {directory}")
    for name, words in (("vLLM", vllm(exported, ServeConfig())), ("SGLang", sglang(exported, ServeConfig()))):
        if words is not None:
            print(f"{name + ':':<8}{shown(words)}")
