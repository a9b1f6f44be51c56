"""The rendered script without a SLURM: its text, its shell syntax, odd characters, and what submission refuses."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cluster import snapshot
from launch.cluster.job import FrozenRun
from launch.cluster.slurm import TRAIN_SCRIPT_BODY, render_train_script
from launch.cluster.submission import submit_runs
from launch.config.frozen import config_yaml
from launch.main import main
from strategies.errors import ConfigError
from tests.helpers.models import tiny_model_dir
from trainer.config.launching import launcher_problems
from trainer.config.run import Code, Device, LauncherConfig, RunConfig, RunSettings, SlurmConfig
from trainer.reporting.status import RunState, write_status

CLONE = Path(__file__).parents[2]
GOLDEN = CLONE / "tests" / "golden" / "slurm_job.sbatch"


def full() -> SlurmConfig:
    """Every setting away from its default."""
    return SlurmConfig(
        nodes=4,
        rdzv="head:29400",
        partition="gpu",
        account="lab",
        qos="long",
        time="2-00:00:00",
        gpus_per_node=8,
        cpus_per_task=64,
        mem="500G",
        exclusive=True,
        constraint="h100&ib",
        exclude="n[3,7]",
        reservation="week",
        gres="shard:8",
        job_name="first",
        comment="the first run, of many",
        after="16:17_2",
        dependency="singleton",
        mail="END,FAIL",
        mail_user="me@lab",
        signal_lead_s=300,
        retry={"preempted": 3, "node_fail": 1},
        setup=["module load cuda", "export HF_HOME='/big disk/hf'"],
        python="/opt/env/bin/python",
        extra=["--licenses=matlab"],
    )


def rendered(launcher: LauncherConfig, *runs: str) -> str:
    dirs = [Path(run) for run in runs or ("/runs/first",)]
    return render_train_script(RunConfig(launcher=launcher), dirs, code_dir=Path("/clone"), cwd=Path("/data"))


def check_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_rendered_script_is_the_golden_one() -> None:
    text = rendered(full())
    check_syntax(text)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "if the change is meant: UPDATE_GOLDEN=1 pytest tests/slurm/test_script.py"


def test_script_for_people_has_the_body_of_the_rendered_script() -> None:
    text = (CLONE / "slurm" / "train.sbatch").read_text()
    check_syntax(text)
    assert text.endswith(TRAIN_SCRIPT_BODY)
    check_syntax((CLONE / "slurm" / "env.sh").read_text())


def test_rendered_script_of_the_defaults_asks_for_nothing_a_site_may_not_have() -> None:
    text = rendered(SlurmConfig())
    options = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert sorted(options) == sorted(
        ["job-name", "nodes", "ntasks-per-node", "time", "chdir", "output", "open-mode", "signal", "requeue"]
    )


def test_array_has_a_directory_for_each_task() -> None:
    text = rendered(SlurmConfig(array_limit=1), "/runs/a", "/runs/b c")
    check_syntax(text)
    assert "#SBATCH --array=0-1%1\n" in text
    assert "#SBATCH --array=0-1\n" in rendered(SlurmConfig(), "/runs/a", "/runs/b c")
    assert "#SBATCH --output=/runs/a/logs/%x-%A_%a.out\n" in text
    assert "runs=(/runs/a '/runs/b c')" in text
    assert "#SBATCH --job-name=sweep-0\n" in rendered(
        SlurmConfig(), "/runs/sweep/0"
    )  # `0` alone says nothing in the queue


def test_odd_characters_reach_the_shell_unharmed(tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s $HOME `id` "100%j" #1; exit 9 &'
    config = RunConfig(launcher=SlurmConfig(python=str(odd / "python")))
    text = render_train_script(config, [odd], code_dir=odd, cwd=odd)
    check_syntax(text)
    options = {k: shlex.split(v)[0] for k, v in re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M)}
    assert options["chdir"] == str(odd)
    assert options["output"].replace("%%", "%") == f"{odd}/logs/%x-%j.out"
    assert not set(options["job-name"]) & set("'$ `\"%#;&")
    head = text.removesuffix(TRAIN_SCRIPT_BODY) + 'printf "%s\\n" "$python" "$SHARDTUNE_CONFIG" "$PYTHONPATH"\n'
    env = {"PATH": os.environ["PATH"]}
    said = subprocess.run(["bash", "-euc", head], text=True, capture_output=True, env=env, check=True).stdout
    assert said.splitlines() == [str(odd / "python"), str(odd / "config.yaml"), str(odd)]


LOST = """#!/bin/bash
[ -z "$TERM_COMES" ] || kill -TERM $PPID
if [ -n "$SAVED" ]; then
  echo '{"state": "preempted", "step": '$SAVED', "restart": 0, "job": "7"}' >"$SHARDTUNE_RUN_DIR/status.json"
else
  echo '{"retry": "node_fail", "restart": 0, "job": "'${WROTE:-7}'"}' >"$SHARDTUNE_RUN_DIR/failure.json"
fi
exit 1
"""
SCONTROL = """#!/bin/bash
case $1$2 in
  showjob) echo "PreemptTime=$PREEMPTED" ;;
  *) echo "$*" >>"$SHARDTUNE_RUN_DIR/asked"
    [ "$(wc -l <"$SHARDTUNE_RUN_DIR/asked")" -gt "${REFUSED:-0}" ] || { echo "$WORDS" >&2; exit 1; } ;;
esac
"""
BEFORE = (CLONE / "tests/golden/slurm_job_before.sbatch").read_text().partition("\n# ---- From here on")[2]
"""What followed the head of a script before signals were kept from its first line on."""
BUSY = "Unable to contact slurm controller (connect failure)"
OFF = "Requested operation is presently disabled"


@pytest.mark.parametrize(
    ("environment", "asked", "code", "words"),
    [
        ({}, 1, 1, "a rank was lost; it is to be requeued"),
        ({"BODY": "before"}, 1, 1, "a rank was lost; it is to be requeued"),
        ({"TERM_COMES": "1"}, 0, 1, "stopped by SLURM or by scancel, and a rank was lost"),
        ({"PREEMPTED": "2026-11-26T07:00:00"}, 0, 1, "stopped by SLURM or by scancel, and a rank was lost"),
        ({"WROTE": "6"}, 0, 1, "its ranks ended with exit code 1 and wrote no reason"),
        ({"SAVED": "5", "REFUSED": "1", "WORDS": BUSY}, 2, 1, f"scontrol requeue failed: {BUSY}; tried again for "),
        ({"SAVED": "5", "REFUSED": "9", "WORDS": OFF}, 1, 75, f"not requeued: scontrol requeue failed: {OFF}"),
        ({"SAVED": "5", "REFUSED": "9", "WORDS": BUSY, "SLURM_JOB_END_TIME": "1"}, 1, 75, "failed until the end"),
    ],
    ids=["lost", "by the script before", "after TERM", "preempted", "another job", "busy", "never", "no time is left"],
)
def test_rendered_script_requeues_once_and_only_where_slurm_does_not(
    tmp_path: Path, environment: dict[str, str], asked: int, code: int, words: str
) -> None:
    for name, text in (("srun", LOST), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "preempted", "step": 3, "restart": 0, "job": "6"}')  # of an earlier job
    config = RunConfig(launcher=SlurmConfig(retry={"node_fail": 3, "preempted": 2}))
    (run / "config.yaml").write_text(config_yaml(config))
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "PREEMPTED": "None"}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **job, **environment}
    script = render_train_script(config, [run], code_dir=CLONE)
    if "BODY" in environment:
        script = script.removesuffix(TRAIN_SCRIPT_BODY) + "#" + BEFORE
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, env=env)
    assert (done.returncode, words in done.stdout) == (code, True), done.stdout + done.stderr
    asked_of_slurm = (run / "asked").read_text().splitlines() if (run / "asked").exists() else []
    assert asked_of_slurm == ["requeue 7"] * asked, done.stdout
    record = json.loads((run / "job.json").read_text())
    by_slurm = "stopped by SLURM" in done.stdout
    assert record["goes_on"] == (None if by_slurm else bool(asked) and code == 1), record
    assert (record["job"], record["code"], record["nodes"]) == ("7", code, "n1")


@pytest.mark.parametrize(
    ("launcher", "run", "said"),
    [
        (LauncherConfig(), "/runs/a", "launcher=slurm"),
        (SlurmConfig(partition="gpu\n#SBATCH --account=other"), "/runs/a", "launcher.partition"),
        (SlurmConfig(setup=["true\nfalse"]), "/runs/a", "launcher.setup"),
        (SlurmConfig(), "/runs/a\\b", "run.dir"),
    ],
)
def test_refused_settings_name_the_knob(launcher: LauncherConfig, run: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        rendered(launcher, run)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (SlurmConfig(gres="gpu:h100:4", gpus_per_node=8), "launcher.gres=gpu:h100:4: asks for 4 GPUs of a node"),
        (SlurmConfig(gpus_per_node=8, processes=16), "launcher.processes=16: each rank needs a GPU of its own"),
        (SlurmConfig(mem="lots"), "launcher.mem=lots: must be the memory of a node, such as 512G"),
    ],
)
def test_resources_that_contradict_each_other_are_refused(launcher: SlurmConfig, said: str) -> None:
    assert [problem for problem in launcher_problems(RunConfig(launcher=launcher)) if said in problem]


def test_resources_that_agree_are_not_refused() -> None:
    on_cpus = SlurmConfig(gpus_per_node=1, processes=4, mem="0")
    assert not [*launcher_problems(RunConfig(launcher=on_cpus, run=RunSettings(device=Device.cpu)))]
    assert not [*launcher_problems(RunConfig(launcher=SlurmConfig(gres="gpu:h100:8", gpus_per_node=8, mem="512000")))]
    assert not [*launcher_problems(RunConfig(launcher=full()))]


class TestSubmit:
    """With a stand-in for sbatch that tells what it was given."""

    @pytest.fixture
    def sbatch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        tool = tmp_path / "bin" / "sbatch"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\nenv >{tmp_path}/env; echo "$@" >{tmp_path}/args\necho "17;cluster"\n')
        tool.chmod(0o755)
        (tool.parent / "squeue").symlink_to("/bin/true")
        (tool.parent / "sinfo").symlink_to("/bin/false")  # one without a cluster looks for it for seconds
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        return tool

    def test_submission_writes_the_script_and_says_how_to_watch(
        self, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "SLURM_CONF"):
            monkeypatch.setenv(name, "1")
        run = tmp_path / "run"
        config = RunConfig(launcher=SlurmConfig())
        [told] = submit_runs(config, [run], print_only=False)
        assert told.runs == [str(run.absolute())] and told.jobs.keys() == told.scripts.keys() == {"train"}
        [code] = (run / "code").iterdir()
        assert (run / "train.sbatch").read_text() == render_train_script(config, [run], code_dir=code)
        assert (run / "logs").is_dir()
        assert (tmp_path / "args").read_text().split() == ["--parsable", str(run / "train.sbatch")]
        given = (tmp_path / "env").read_text().splitlines()
        assert [line for line in given if line.startswith(("SLURM", "SBATCH", "SRUN"))] == ["SLURM_CONF=1"]
        said = capsys.readouterr().out
        assert not (run / "pipeline.json").exists()
        assert "job 17:" in said and f"{code}: a copy of the code" in said
        assert f"tail -F {run}/logs/run-17-0.log" in said

    def test_print_shows_the_time_limit_and_refuses_one_that_is_too_short(
        self, sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        submit_runs(RunConfig(launcher=SlurmConfig(time="12:00")), [tmp_path / "run"], print_only=True)
        assert "# time    0:12:00 a start, 180 s before its end it saves" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=r"signal_lead_s=180: launcher\.time=2:00"):
            submit_runs(RunConfig(launcher=SlurmConfig(time="2:00")), [tmp_path / "run"], print_only=True)
        longer = SlurmConfig(time="2:00", extra=["--time=1-0"])  # sbatch takes the last of two
        submit_runs(RunConfig(launcher=longer), [tmp_path / "run"], print_only=True)
        assert "# time    1-0:00:00 a start" in capsys.readouterr().err

    def test_slurm_that_does_not_answer_is_no_wrong_setting(self, sbatch: Path, tmp_path: Path) -> None:
        sbatch.write_text("#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller (x)' >&2; exit 1\n")
        with pytest.raises(ConfigError, match="cannot reach SLURM from this host: Unable to contact") as refusal:
            submit_runs(RunConfig(launcher=SlurmConfig()), [tmp_path / "run"], print_only=False)
        assert "launcher." not in str(refusal.value)

    def test_json_leaves_stdout_to_the_answer(
        self, sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
        words = [f"model.path={tiny_model_dir(tmp_path / 'model')}", f"data.path={tmp_path / 'data.jsonl'}"]
        run = tmp_path / "run"
        capsys.readouterr()
        assert main(["submit", *words, "budget.steps=3", f"run.dir={run}", "--json"]) == 0
        said = capsys.readouterr()
        told = json.loads(said.out)
        assert (told["jobs"], told["runs"]) == ({"train": "17"}, [str(run)])
        assert told["scripts"] == {"train": str(run / "train.sbatch")} and "submitted job 17" in said.err
        write_status(run, RunState.done)
        assert main(["submit", *words, "budget.steps=3", f"run.dir={run}", "--json"]) == 0
        nothing = {"jobs": {}, "runs": [str(run)], "scripts": {}, "code": None}
        assert json.loads(capsys.readouterr().out) == nothing
        assert main(["submit", *words, "--json", "--print"]) == 64
        assert "leave --print" in capsys.readouterr().err

    def test_submission_prefers_settings_to_the_environment_and_passes_the_rest_on(
        self, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With a site whose sbatch prints words of its own, and the ranks that the job will then count."""
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        sbatch.write_text(sbatch.read_text() + "echo 'Welcome to the cluster! 2 news'\n")
        open_options = {"SBATCH_ACCOUNT": "lab", "SBATCH_QOS": "long"}
        decided = {"TIMELIMIT": "1:00", "ARRAY_INX": "0-2", "NO_REQUEUE": "1", "SIGNAL": "B:USR1@9", "WAIT": "1"}
        decided |= {"PARTITION": "debug", "GPUS": "1", "GRES": "gpu:1", "OUTPUT": "x", "MEM_PER_CPU": "1G"}
        for name, value in (open_options | {f"SBATCH_{key}": value for key, value in decided.items()}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
        run = tmp_path / "run"
        words = [f"model.path={tiny_model_dir(tmp_path / 'model')}", f"data.path={tmp_path / 'data.jsonl'}"]
        words += [
            "budget.steps=3",
            "strategy=ddp",
            "launcher.gres=gpu:h100:8",
            "launcher.partition=gpu",
            "launcher.mem=9G",
        ]
        assert main(["submit", *words, f"run.dir={run}"]) == 0
        said = capsys.readouterr().out
        assert f"submitted job 17: {run}/train.sbatch" in said and (run / "submitted").read_text() == "17\n"
        reached = {line for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SBATCH_")}
        assert reached == {f"{name}={value}" for name, value in open_options.items()}
        assert all(f"environ {name}={value} is passed on" in said for name, value in open_options.items())
        assert all(f"environ SBATCH_{name} is not passed on: " in said for name in decided)
        assert "SBATCH_TIMELIMIT is not passed on: the run says --time=24:00:00" in said
        assert "ranks   1 x 8, one for each GPU of a node (launcher.gres=gpu:h100:8)" in said
        assert FrozenRun.read(run).processes == 8
        assert main(["submit", *words[:4], f"run.dir={tmp_path / 'cpu'}"]) == 64
        assert "SBATCH_GPUS=1 SBATCH_GRES=gpu:1: the environment asks for GPUs, and this run for none" in (
            capsys.readouterr().err
        )
        sbatch.write_text("#!/bin/sh\necho 'Welcome!'\n")
        assert main(["submit", *words, f"run.dir={tmp_path / 'other'}"]) == 64
        assert "no job id is in what it printed: Welcome!" in capsys.readouterr().err

    def test_submission_with_print_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = RunConfig(launcher=SlurmConfig())
        assert submit_runs(config, [tmp_path / "run"], print_only=True) == []
        code = snapshot.code_copy_dir(tmp_path / "run", snapshot.code_digest(snapshot.read_code()))
        assert capsys.readouterr().out == render_train_script(config, [tmp_path / "run"], code_dir=code)
        assert not (tmp_path / "run").exists()
        config.launcher.code = Code.clone
        assert submit_runs(config, [tmp_path / "run"], print_only=True) == []
        assert capsys.readouterr().out == render_train_script(config, [tmp_path / "run"], code_dir=CLONE)

    def test_submission_passes_on_a_refusal(self, sbatch: Path, tmp_path: Path) -> None:
        sbatch.write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2; exit 1\n")
        with pytest.raises(ConfigError, match="invalid partition specified: gpu"):
            submit_runs(RunConfig(launcher=SlurmConfig()), [tmp_path / "run"], print_only=False)

    def test_submission_says_that_sbatch_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="sbatch, which is not on PATH"):
            submit_runs(RunConfig(launcher=SlurmConfig()), [tmp_path / "run"], print_only=False)
