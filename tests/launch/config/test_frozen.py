"""The frozen configuration: read back equal, refused when edited, and one run to a directory."""

import os
from dataclasses import replace

import pytest
import yaml

from launch.config.compose import compose_config, default_run_dir, load_frozen_config
from launch.config.frozen import (
    GROUPS_WITHOUT_EFFECT_ON_RESULT,
    config_sha256,
    rewrite_config_with_own_choices,
)
from launch.config.resume import keep_earlier_defaults
from launch.runs.freeze import write_run_config
from strategies.errors import ConfigError, StorageError
from trainer.evaluation.base import TaskConfig
from trainer.reporting.resolution import ResolvedSetting
from trainer.reporting.status import write_status
from trainer.session.lease import Lease


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def composed(*words):
    return compose_config(["model.path=m", "budget.steps=3", "run.device=cpu", *words], check=False)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["strategy=zero3", "tuning=lora", "objective=classification", "objective.labels=['no','1']"],
        ["strategy=hsdp", "launcher=slurm", "launcher.setup=['module load cuda']", "launcher.time=24:00:00"],
        ["data.path=[a b.jsonl,'c: d.jsonl']", "data.columns.prompt=yes", "logging.group=007", "optim.lr=1e-7"],
        ["data.path=über/#1: 'x' {y}.jsonl", "run.resume=never", "precision=fp32", "optim.lr=1"],
    ],
)
def test_a_frozen_configuration_reads_back_equal(tmp_path, words):
    one = composed(*words)
    assert write_run_config(one, tmp_path / "run") == tmp_path / "run"
    again = load_frozen_config(tmp_path / "run" / "config.yaml")
    assert again == one.config
    assert type(again.strategy) is type(one.config.strategy)
    assert config_sha256(again) == one.sha256
    assert again.run.dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    "word",
    [
        "run.dir=x",
        "run.resume=never",
        "run.threads=2",
        "logging.wandb=disabled",
        "launcher.processes=4",
        "launcher=slurm",
    ],
)
def test_config_hash_is_the_same_however_a_run_is_started_and_reported(word):
    words = ["precision=fp32"]
    assert composed(*words, word).sha256 == composed(*words).sha256


@pytest.mark.parametrize(
    "word",
    ["run.seed=1", "optim.lr=1e-3", "strategy=ddp", "tuning=lora", "data.path=x", "batch.global=8", "precision=bf16"],
)
def test_config_hash_differs_by_what_decides_the_result(word):
    assert composed(word).sha256 != composed().sha256


def test_an_edited_file_is_refused(tmp_path):
    path = write_run_config(composed(), tmp_path) / "config.yaml"
    path.write_text(path.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(ConfigError, match="was changed after the run began"):
        load_frozen_config(path)


@pytest.mark.parametrize("text", ["", "a: [", "run: 3\n", "- 1\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_frozen_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_frozen_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("key", ["substitutions", "batch", "run"])
def test_a_file_that_lost_a_group_is_refused(tmp_path, key):
    path = write_run_config(composed(), tmp_path) / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree[key]
    header = path.read_text().partition("\n")[0]
    path.write_text(f"{header}\n{yaml.safe_dump(tree)}")
    with pytest.raises(ConfigError, match=f"not a configuration of this version .*{key}"):
        load_frozen_config(path)


@pytest.mark.parametrize("content", [b"", bytes(4096), b"\xff\xfe"])
def test_frozen_configuration_that_is_torn_names_the_way_out(tmp_path, content):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: is torn, as by a power cut; delete it, and the same command"):
        write_run_config(composed(), tmp_path)
    (tmp_path / "config.yaml").unlink()
    write_run_config(composed(), tmp_path)


@pytest.mark.parametrize("name", ["logs", "checkpoints", "lease"])
def test_a_file_in_the_place_of_a_directory_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{name}: is a file, where the run needs a directory; move it away"):
        write_run_config(composed(), tmp_path)


def write_without(path, *keys):
    """Rewrite a frozen configuration as a version wrote it that had none of these settings."""
    import hashlib
    import json

    from omegaconf import OmegaConf

    header = path.read_text().partition("\n")[2].splitlines(keepends=True)[:2]
    tree = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    for key in keys:
        group, name = key.split(".")
        del tree[group][name]
    kept = {k: v for k, v in tree.items() if k not in GROUPS_WITHOUT_EFFECT_ON_RESULT}
    kept["run"] = {"seed": tree["run"]["seed"]}
    kept["data"] = {**tree["data"], "control_tokens": "text"}  # `auto` counts as this
    kept["export"] = {k: v for k, v in tree["export"].items() if k != "checkpoint"}
    sha256 = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    words = "".join(line for line in header if line.startswith("#"))
    path.write_text(f"# sha256: {sha256}\n{words}{OmegaConf.to_yaml(OmegaConf.create(tree))}")


def test_a_prefix_run_of_a_version_without_a_choice_of_start_keeps_its_random_one(tmp_path):
    path = write_run_config(composed("tuning=prefix"), tmp_path) / "config.yaml"
    assert load_frozen_config(path).tuning.init == "zero"
    write_without(path, "tuning.init")
    assert load_frozen_config(path).tuning.init == "random"
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    today = composed("tuning=prefix")
    write_run_config(today, tmp_path)
    assert today.config.tuning.init == load_frozen_config(path).tuning.init == "random"


def test_a_file_of_a_version_with_fewer_settings_still_reads(tmp_path):
    path = write_run_config(composed(), tmp_path) / "config.yaml"
    write_without(path, "optim.max_skipped_steps", "export.checkpoint")
    # A run of that version exports its last checkpoint, as it would have done then.
    assert load_frozen_config(path) == composed(f"run.dir={tmp_path}", "export.checkpoint=last").config
    write_status(tmp_path, "done")
    write_run_config(composed(), tmp_path)  # and its directory can be continued
    assert load_frozen_config(path).export.checkpoint == "last"


def test_run_directory_of_another_run_is_refused_with_what_differs(tmp_path):
    write_run_config(composed("optim.lr=1e-3"), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    write_run_config(composed("optim.lr=1e-3", "logging.every_steps=1"), tmp_path)  # the same run
    with pytest.raises(ConfigError) as caught:
        write_run_config(composed("optim.lr=1e-4", "strategy=ddp"), tmp_path)
    (problem,) = caught.value.problems  # not counted as three
    assert "optim.lr: 0.001 there, 0.0001 here" in problem and "strategy.name: single there, ddp here" in problem


def test_frozen_default_that_changed_since_the_run_began_is_kept(tmp_path, capsys):
    words = ["optim.lr=1e-3", "logging.every_steps=1"]
    write_run_config(with_earlier_default(composed(*words)), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    today = composed("optim.lr=1e-3", "logging.every_steps=2")
    assert today.config.optim.weight_decay != EARLIER_WEIGHT_DECAY
    of_another_rank = composed(*words)
    keep_earlier_defaults(of_another_rank, tmp_path)
    write_run_config(today, tmp_path)
    assert of_another_rank.sha256 == today.sha256
    assert today.config.optim.weight_decay == EARLIER_WEIGHT_DECAY
    assert today.config.logging.every_steps == 2
    assert load_frozen_config(tmp_path / "config.yaml") == today.config
    assert f"keeps the defaults that it began with: optim.weight_decay: {EARLIER_WEIGHT_DECAY} there, " in (
        capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match=r"optim\.weight_decay"):  # other words may mean another value
        write_run_config(composed("optim.lr=1e-3", "optim.weight_decay=0.5"), tmp_path)


def test_checkpoint_that_is_exported_may_be_named_when_a_run_goes_on(tmp_path):
    """Also where shardtune has changed a default since the run began, and for a run that began with another choice."""
    write_run_config(with_earlier_default(composed("export.checkpoint=last")), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for words, exported in ([], "last"), (["export.checkpoint=best"], "best"), (["export.checkpoint=auto"], "auto"):
        today = composed(*words)
        of_another_rank = composed(*words)
        keep_earlier_defaults(of_another_rank, tmp_path)
        write_run_config(today, tmp_path)
        assert today.config.export.checkpoint == of_another_rank.config.export.checkpoint == exported
        assert today.config.optim.weight_decay == EARLIER_WEIGHT_DECAY


@pytest.mark.parametrize("name", ["q", "q.kind"])
def test_frozen_paths_and_code_of_others_are_not_taken_over_as_earlier_defaults(tmp_path, name, monkeypatch):
    """Who made a directory also wrote the words in the head of its config.yaml: they need not be what made the rest."""
    theirs = composed()
    theirs.config.evaluation.tasks = {name: TaskConfig(kind="lm_eval", path="/theirs/task.yaml")}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "author"))
    write_run_config(theirs, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "reader"))
    mine = composed()
    with pytest.raises(ConfigError, match=r"different settings(?s:.)*/theirs/task\.yaml there"):
        write_run_config(mine, tmp_path / "run")
    assert mine.config.evaluation.tasks == {} and not (tmp_path / "reader").exists()


@pytest.mark.parametrize("source", ["file", "variable"])
def test_frozen_words_are_another_run_if_files_or_variables_they_name_may_have_changed(tmp_path, monkeypatch, source):
    monkeypatch.setenv("LENGTH", "128")
    (tmp_path / "mine.yaml").write_text("optim: {lr: 1e-3}")
    words = {"file": [str(tmp_path / "mine.yaml")], "variable": ["data.max_length=${oc.env:LENGTH}"]}[source]
    write_run_config(with_earlier_default(composed(*words)), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="different settings"):
        write_run_config(composed(*words), tmp_path / "run")


EARLIER_WEIGHT_DECAY = 0.125


def with_earlier_default(one):
    """The run as a version with another default of `optim.weight_decay` composed it."""
    one.config.optim.weight_decay = EARLIER_WEIGHT_DECAY
    return one


def test_choices_are_not_written_over_an_edited_file(tmp_path):
    config = composed().config
    path = write_run_config(composed(), tmp_path / "run") / "config.yaml"
    header = path.read_text().splitlines()[:3]
    rewrite_config_with_own_choices(path.parent, config)
    assert path.read_text().splitlines()[:3] == header
    path.write_text(path.read_text().replace("  steps: 3\n", "  steps: 30\n"))
    with pytest.raises(ConfigError, match="was changed after the run began"):
        rewrite_config_with_own_choices(path.parent, config)


def test_unfinished_run_may_go_on_with_another_strategy_and_micro_batch(tmp_path, capsys):
    write_run_config(composed("strategy=single", "batch.micro=4"), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    way = composed("strategy=fsdp2", "batch.micro=2", "launcher.processes=2", "parallel.sequence=2")
    with pytest.raises(ConfigError, match="different settings"):
        write_run_config(way, tmp_path)  # as a point of a comparison
    write_run_config(way, tmp_path, may_change_strategy=True)
    assert "resumes in another way: batch.micro: 4 there, 2 here; " in (said := capsys.readouterr().err)
    assert " there, - here" not in said and ": - there" not in said, "what only one strategy has follows from its name"
    assert "strategy.name: single there, fsdp2 here" in said and "parallel.sequence: 1 there, 2 here" in said
    assert load_frozen_config(tmp_path / "config.yaml") == way.config
    for words in (["strategy=fsdp2", "batch.micro=2", "optim.lr=1e-6"], ["batch.micro=2", "run.seed=1"]):
        with pytest.raises(ConfigError, match="different settings"):
            write_run_config(composed(*words), tmp_path, may_change_strategy=True)
    write_status(tmp_path, "done")
    with pytest.raises(ConfigError, match="different settings"):
        write_run_config(composed("strategy=single", "batch.micro=4"), tmp_path, may_change_strategy=True)


def test_unfinished_run_resumes_with_other_operational_settings(tmp_path, capsys):
    write_run_config(composed(), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    operational = (
        "checkpoint.keep=1",
        "checkpoint.background=false",
        "data.workers=1",
        "evaluation.judge.timeout_s=77",
    )
    other_disk = f"checkpoint.fallback_dir={tmp_path / 'other'}"
    changed = composed(*operational, other_disk)
    write_run_config(changed, tmp_path, may_change_strategy=True)
    said = capsys.readouterr().err
    assert "resumes in another way: checkpoint.background: True there, False here; " in said and "data.workers" in said
    assert load_frozen_config(tmp_path / "config.yaml") == changed.config
    # A checkpoint may lie in the earlier fallback directory: without it, an older one would be resumed.
    with pytest.raises(ConfigError, match=r"fallback_dir: .*other there, null here"):
        write_run_config(composed(*operational), tmp_path, may_change_strategy=True)
    with pytest.raises(ConfigError, match=r"budget\.steps"):
        write_run_config(composed(*operational, other_disk, "budget.steps=99"), tmp_path, may_change_strategy=True)


def test_run_directory_without_any_progress_takes_a_corrected_command(tmp_path):
    write_run_config(composed("optim.lr=1e-3"), tmp_path)
    write_run_config(composed("optim.lr=1e-4"), tmp_path)
    assert load_frozen_config(tmp_path / "config.yaml").optim.lr == 1e-4
    write_status(tmp_path, "done")
    with pytest.raises(ConfigError, match="different settings"):
        write_run_config(composed("optim.lr=1e-3"), tmp_path)


def test_resume_never_refuses_a_directory_with_checkpoints(tmp_path):
    write_run_config(composed("run.resume=never"), tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    write_run_config(composed(), tmp_path)
    with pytest.raises(ConfigError, match=r"run\.resume=never"):
        write_run_config(composed("run.resume=never"), tmp_path)


def test_a_directory_in_use_is_refused_and_a_dead_owner_is_not(tmp_path):
    write_run_config(composed(), tmp_path)
    with Lease.acquire(tmp_path, 60), pytest.raises(ConfigError, match=f"process {os.getpid()} on .*, is running it"):
        write_run_config(composed(), tmp_path)
    write_run_config(composed(), tmp_path)  # it is over


def test_run_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_run_config(composed(), tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        write_run_config(composed(), tmp_path / "file" / "below")


def test_the_default_directory_survives_a_requeue(monkeypatch):
    assert default_run_dir("a" * 64).name.startswith("aaaaaaaa-2")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert str(default_run_dir("a" * 64)) == "runs/aaaaaaaa-4711"


def test_micro_batch_chosen_by_the_run_belongs_to_the_same_words(tmp_path):
    """The same words find their run again, and its choice; a number that is typed, or edited in the file, is another."""
    asked = composed("batch.micro=auto")
    directory = write_run_config(asked, tmp_path / "run")
    resolution = ResolvedSetting("batch.micro", "auto", 8, "planned")
    chosen = replace(asked.config, batch={"global": 32, "micro": 8}, substitutions={"batch.micro": resolution})
    rewrite_config_with_own_choices(directory, chosen)
    assert config_sha256(chosen) == asked.sha256 and load_frozen_config(directory / "config.yaml") == chosen
    (directory / "checkpoints/step-000001").mkdir(parents=True)
    again = composed("batch.micro=auto")
    write_run_config(again, directory)
    assert again.config.batch["micro"] == 8 and again.config.substitutions["batch.micro"] == resolution
    assert load_frozen_config(directory / "config.yaml").batch["micro"] == 8
    with pytest.raises(ConfigError, match=r"batch\.micro: auto there, 8 here"):
        write_run_config(composed("batch.micro=8"), directory)
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("micro: 8", "micro: 4"))
    with pytest.raises(ConfigError, match="was changed after the run began"):
        load_frozen_config(directory / "config.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.micro=many"], "batch.micro=many: batch.micro must be a whole number, or auto"),
        (["batch.micro=1.5"], "batch.micro=1.5: batch.micro must be a whole number, or auto"),
        (["batch.global=auto"], "batch.global=auto: batch.global must be a whole number"),
        (
            ["batch.micro=auto", "batch.global=10", "launcher.processes=4", "strategy=ddp"],
            "batch.global=10: must be a multiple of the 4 ranks; set batch.global=8 or batch.global=12",
        ),
    ],
)
def test_batch_sizes_that_are_no_number_or_not_divisible_are_refused(words, said):
    with pytest.raises(ConfigError) as refused:
        compose_config(["model.path=m", "budget.steps=3", "run.device=cpu", *words])
    assert [problem for problem in refused.value.problems if problem.startswith("batch")] == [said]
