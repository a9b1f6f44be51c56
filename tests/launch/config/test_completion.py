"""Completion as the shells do it: the printed script is loaded by a real shell and asked."""

import re
import shutil
import subprocess

import pytest

from launch.config.completion import completion_script
from launch.main import DESCRIPTION_BY_VERB, declared_arguments
from tests.helpers.speed import seconds

ASK = {
    "bash": """
source {script}
ask() {{ COMP_LINE="$1" COMP_POINT=${{#1}}; COMPREPLY=(); _shardtune 2>/dev/null; echo "${{COMPREPLY[*]}}"; }}
ask 'shardtune tr'
ask 'shardtune train strat'
ask 'shardtune train strategy=z'
ask 'shardtune train data.packing='
ask 'shardtune train --dr'
ask 'shardtune export gguf'
ask 'shardtune train gguf'
ask 'shardtune train model.path={directory}/mod'
ask 'shardtune train {directory}/my'
""",
    "fish": """
source {script}
for line in 'shardtune tr' 'shardtune train strat' 'shardtune train strategy=z' \\
    'shardtune train data.packing=' 'shardtune train --dr' 'shardtune export gguf' 'shardtune train gguf' \\
    'shardtune train model.path={directory}/mod' 'shardtune train {directory}/my'
    echo (complete -C $line | string split -f 1 \\t)
end
""",
}


@pytest.mark.parametrize("shell", ASK)
def test_a_real_shell_completes(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "models").mkdir()
    (tmp_path / "my.yaml").touch()
    file = tmp_path / "completion"
    file.write_text(completion_script(shell, DESCRIPTION_BY_VERB, declared_arguments()))
    commands = ASK[shell].format(script=file, directory=tmp_path)
    done = subprocess.run([shell, "-c", commands], capture_output=True, text=True, timeout=seconds(60))
    verbs, keys, choices, switch, flags, own, none, paths, files = done.stdout.splitlines()
    assert verbs.split() == ["train"]
    assert {"strategy=", "strategy.compile="} <= set(keys.split())
    assert [re.sub(".*=", "", each) for each in choices.split()] == ["zero1", "zero2", "zero3"]
    assert sorted(re.sub(".*=", "", each) for each in switch.split()) == ["false", "true"]
    assert "--dry-run" in flags.split()
    assert own.split() == ["gguf=", "gguf.converter=", "gguf.python="], "words of a verb are offered for it"
    assert none.split() == [], "and for no other verb"
    assert paths.rstrip("/").endswith(f"{tmp_path}/models")
    assert f"{tmp_path}/my.yaml" in files.split()


def test_zsh_loads_the_script(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    (tmp_path / "_shardtune").write_text(completion_script("zsh", DESCRIPTION_BY_VERB, declared_arguments()))
    told = "words=(shardtune train strategy=z); CURRENT=3; compadd() { echo $@ }; compset() { }; "
    commands = f"autoload -U compinit; compinit -u -d {tmp_path}/dump; source {tmp_path}/_shardtune; {told} _shardtune"
    done = subprocess.run(["zsh", "-fc", commands], capture_output=True, text=True, timeout=seconds(60))
    assert "zero1 zero2 zero3" in done.stdout, done.stderr
