"""The commands for vLLM and SGLang use arguments that these have (`arguments.json`: read from their sources), and no key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from launch.config.verb_arguments import read_setting_group
from launch.serve.config import ServeConfig, ServedType
from launch.serve.exported import ExportedModel, find_export
from launch.serve.middleware import VllmMiddleware
from launch.serve.other_servers import VLLM_MIDDLEWARE_CLASS, sglang_command, vllm_command, vllm_environment
from strategies.errors import ConfigError
from tests.helpers.launching import ROOT, clean_environment, command_here
from tests.helpers.speed import seconds

KNOWN = {
    engine: {f"--{name}" for source in sources for name in source["arguments"]}
    for engine, sources in json.loads((Path(__file__).parent / "arguments.json").read_text()).items()
}


@pytest.mark.parametrize("run", ["lora", "full"])
def test_serve_command_uses_only_arguments_of_the_other_server(site, run):
    exported, config = find_export(str(site / run)), ServeConfig(dtype=ServedType.bfloat16)
    for engine, words in (
        ("vllm", vllm_command(exported, config, with_middleware=True)),
        ("sglang", sglang_command(exported, config)),
    ):
        assert {word for word in words if word.startswith("--")} <= KNOWN[engine]
        assert str(site / run / "export") in " ".join(words)
    words = vllm_command(exported, config)
    assert ("--enable-lora" in words) == (run == "lora") and words[2] == str(
        site / ("model" if run == "lora" else "full/export")
    )
    assert json.loads(words[words.index("--override-generation-config") + 1]) == {"max_new_tokens": 1024}


@pytest.mark.parametrize("base", ["--config=/theirs.yaml", ["model"]])
def test_a_base_is_no_option_of_a_server(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        find_export(str(tmp_path))


def test_serve_vllm_rank_is_one_that_it_has_room_for():
    def rank(number):
        words = vllm_command(ExportedModel(Path("x"), "x", "base", {"peft_type": "LORA", "r": number}), ServeConfig())
        return words[words.index("--max-lora-rank") + 1]

    assert [rank(number) for number in (4, 8, 9, 64, 200)] == ["8", "8", "16", "64", "256"]


def test_serve_adapter_with_own_positions_overrides_those_of_the_base(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, "rope_parameters": rope}))
    exported = ExportedModel(tmp_path, "x", "base", {"peft_type": "LORA", "r": 8})
    words = vllm_command(exported, ServeConfig())
    assert "--hf-overrides" in KNOWN["vllm"]
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    assert overrides == {"max_position_embeddings": 2048, "rope_parameters": rope}
    assert sglang_command(exported, ServeConfig()) is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    assert "--hf-overrides" not in vllm_command(exported, ServeConfig())
    assert sglang_command(exported, ServeConfig()) is not None


def test_serve_names_adapter_kinds_that_vllm_and_sglang_do_not_take(site, capsys):
    assert vllm_command(ExportedModel(Path("x"), "x", "base", {"peft_type": "IA3"}), ServeConfig()) is None
    assert command_here(["serve", str(site / "lora"), "--print"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("vllm serve ") and second.startswith("python -m sglang.launch_server ")


def test_serve_middleware_stands_before_the_application_of_vllm(monkeypatch):
    """As `--middleware` puts a class: added to the application, told by the environment alone."""
    monkeypatch.setenv("THE_KEY", "k1")
    config = ServeConfig(key_env="THE_KEY", name="tuned", max_body_kib=1)
    told = vllm_environment(ExportedModel(Path("x"), "x", None, {}), config)
    assert told["VLLM_API_KEY"] == "k1" and "k1" not in told["SHARDTUNE_SERVE"]
    assert f"{VllmMiddleware.__module__}.{VllmMiddleware.__qualname__}" == VLLM_MIDDLEWARE_CLASS
    monkeypatch.setenv("SHARDTUNE_SERVE", told["SHARDTUNE_SERVE"])
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(body: dict):
        return body

    @app.post("/invocations")
    async def invocations(body: dict):
        return body

    app.add_middleware(VllmMiddleware)
    client, key = TestClient(app), {"Authorization": "Bearer k1"}
    assert client.post("/v1/completions", json={"prompt": "x"}, headers=key).json() == {"prompt": "x", "model": "tuned"}
    assert client.post("/invocations", json={"prompt": "x"}, headers=key).status_code == 404
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
    assert client.post("/v1/completions", json={"model": "tuned-base"}, headers=key).status_code == 404
    assert client.post("/v1/completions", json={"prompt": "x" * 2000}, headers=key).status_code == 413


@pytest.fixture
def vllm_python(tmp_path):
    """The path of a Python that finds a package vllm, as that of vLLM's own environment does. It is no vLLM."""
    package = tmp_path / "their" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(
        "import json, os, sys\n"
        "import launch.serve.middleware\n"
        "print(json.dumps({'arguments': sys.argv[1:], 'modules': sorted(sys.modules), 'path': os.environ['PYTHONPATH']}))\n"
    )
    python = tmp_path / "python"
    # -S: this Python has no packages but those of its own environment.
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={tmp_path / "their"}${{PYTHONPATH:+:$PYTHONPATH}} exec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    return python


def test_serve_starts_vllm_of_another_environment_behind_the_gateway(site, vllm_python, tmp_path):
    env = clean_environment(SHARDTUNE_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-m", "launch.main", "serve", str(site / "full"), f"serve.python={vllm_python}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
    *said, answer = done.stdout.splitlines()
    started = json.loads(answer)
    assert "computes in float32 (serve.dtype)" in said
    assert started["arguments"][:2] == ["serve", str(site / "full" / "export")]
    assert {"--middleware", VLLM_MIDDLEWARE_CLASS, "--dtype", "float32"} <= set(started["arguments"])
    # Of this environment it has the gateway alone: no library of ours may stand in for one of vLLM's.
    assert "launch.serve.middleware" in started["modules"] and "transformers" not in started["modules"]
    shown = started["path"].split(":")
    assert str(tmp_path / "cache" / "gateway") in shown
    assert sorted(entry.name for entry in (tmp_path / "cache" / "gateway").iterdir()) == ["launch", "strategies"]


def test_serve_python_that_cannot_serve_is_refused(site, tmp_path, capsys):
    run = str(site / "lora")
    (tmp_path / "file").touch()
    for words, said in (
        (["serve.python=nowhere"], "serve.python=nowhere: there is no such program"),
        ([f"serve.python={tmp_path / 'file'}"], "there is no such program"),
        ([f"serve.python={sys.executable}"], "is no Python that has vLLM"),
        ([f"serve.python={sys.executable}", "serve.engine=transformers"], "leave one of them out"),
    ):
        assert command_here(["serve", run, *words]) == 64
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "typed", "expected"),
    [
        ({"dtype": "float32"}, "auto", "float32"),
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "auto", "float16"),
        ({"dtype": "float32"}, "bfloat16", "bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "auto", "auto"),
        ({}, "auto", "auto"),
    ],
)
def test_serve_tells_another_server_the_stored_type(tmp_path, settings, typed, expected):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    exported, config = ExportedModel(tmp_path, "x", None, settings), ServeConfig(dtype=ServedType(typed))
    for words in (vllm_command(exported, config), sglang_command(exported, config)):
        told = words[words.index("--dtype") + 1] if "--dtype" in words else "auto"
        assert told == expected


REFUSED = {
    "host": ({"serve.host": "0.0.0.0"}, "must send a key"),
    "port": ({"serve.port": "70000"}, "at most 65535"),
    "word": ({"serve.port": "http"}, "a whole number"),
    "key": ({"serve.key_env": "sk-123"}, "not shown"),
    "no key": ({"serve.key_env": "NOT_SET_ANYWHERE"}, "not set, or empty"),
    "engine": ({"serve.engine": "tgi"}, "one of auto, transformers, vllm"),
    "switch": ({"serve.batching": "perhaps"}, "true or false"),
    "tokens": ({"serve.max_tokens": "0"}, "at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_serve_settings_that_cannot_be_are_refused(case):
    words, said = REFUSED[case]
    config, _, unusable = read_setting_group("serve", ServeConfig(), [f"{key}={value}" for key, value in words.items()])
    problems = unusable or [*config.problems()]
    assert len(problems) == 1 and said in problems[0]
    assert "sk-123" not in problems[0]


def test_serve_command_says_what_is_wrong_with_a_run(site, tmp_path, capsys):
    run = str(site / "lora")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    for words, said in (
        ([], "give one run or export, as in shardtune serve runs/x"),
        (["nowhere"], "there is no such directory"),
        ([str(tmp_path / "unfinished")], "has no export; write it first"),
        ([str(tmp_path / "labels")], "a classifier"),
        ([run, "serve.key=sk-123"], "serve.key_env=SERVE_KEY"),
        ([run, "serve.prot=1"], "did you mean serve.port"),
        ([run, "serve.engine=vllm"], "vLLM is not installed in this environment"),
        ([run, "serve.host=192.0.2.1", "serve.key_env=PATH"], "cannot be listened on"),
    ):
        assert command_here(["serve", *words]) == 64
        told = capsys.readouterr().err
        assert said in told and "sk-123" not in told
    assert command_here(["serve", run, "--dry-run"]) == 0
    assert "would serve lora" in capsys.readouterr().out
