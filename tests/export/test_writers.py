"""The processes that write a whole model: what they hold, how they share the files, what a kill leaves."""

import json
import os
import shutil
import socket
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from launch.cluster import supervisor
from launch.config.compose import compose_config
from launch.export.checkpoint_choice import find_checkpoint
from launch.export.writing import ExportJob, ExportProcessesFailed, export_in_processes
from strategies import atomic_io
from strategies.runtime import Runtime
from strategies.saved_parameters import SavedParameters
from tests.export.test_from_checkpoint import digests
from tests.helpers.exports import model_of, trained
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.helpers.warm import command_warm
from trainer.checkpoints.config import CheckpointConfig
from trainer.export import write as write_module
from trainer.export.config import ExportConfig
from trainer.export.files import (
    RECORDS_DIR_NAME,
    ExportInUse,
    exclusive_export_lock,
    files_of_writer,
    write_export_file,
)
from trainer.export.plan import ExportFile, ExportTensor, plan_files
from trainer.export.trained_model import ModelValues
from trainer.export.write import write_export
from trainer.reporting.documents.facts import ModelFacts
from trainer.run import loop_settings
from trainer.tuning.base import FullConfig

SMALL_FILES = {"max_shard_gib": 3e-5}
PER_FILE = 1 << 15


class Killed(BaseException):
    """As a kill -9: nothing is put in order."""


def write(model, destination, runtime, **settings):
    return write_export(
        model,
        destination=destination,
        config=ExportConfig(**SMALL_FILES | settings),
        facts=ModelFacts(),
        runtime=runtime,
    )


@pytest.fixture
def model(bases, runtime, tmp_path):
    parts = trained(bases("qwen3_moe"), FullConfig(), runtime, steps=1)
    return model_of(*parts, bases("qwen3_moe"), tmp_path / "checkpoint")


def kill_at(number, monkeypatch):
    """Have the process killed before it writes a file: the first is 0. Returns the names of the files that it wrote."""
    names = []

    def write_or_die(plan, file, values, staging_dir):
        if len(names) == number:
            (staging_dir / file.name).write_bytes(b"the beginning of")
            raise Killed
        names.append(file.name)
        write_export_file(plan, file, values, staging_dir)

    monkeypatch.setattr(write_module, "write_export_file", write_or_die)
    return names


def test_a_process_holds_one_file_and_one_group(runtime, tmp_path, monkeypatch):
    """Counted: the bytes of what was read out of the checkpoint, and is still held when the next tensor is read."""
    base = tiny_model_dir(tmp_path / "base", "qwen3_moe", num_hidden_layers=8, num_experts=8)
    tiny_tokenizer().save_pretrained(base)
    model = model_of(*trained(base, FullConfig(), runtime, steps=0), base, tmp_path / "checkpoint")
    held, peak = 0, 0
    state = SavedParameters.saved_tensor

    def forget(size):
        nonlocal held
        held -= size

    def counted(self, name, key):
        nonlocal held, peak
        values = state(self, name, key)
        held += values.nbytes
        peak = max(peak, held)
        weakref.finalize(values.untyped_storage(), forget, values.nbytes)
        return values

    monkeypatch.setattr(SavedParameters, "saved_tensor", counted)
    values = ModelValues(model)
    plan = plan_files(values, torch.float32, PER_FILE)
    (tmp_path / "out" / RECORDS_DIR_NAME).mkdir(parents=True)
    for file in plan.files:
        write_export_file(plan, file, values, tmp_path / "out")
    assert len(plan.files) > 6 and 0 < peak <= plan.process_bytes < plan.num_bytes / 2


def test_next_start_keeps_the_files_that_were_complete(model, runtime, tmp_path, monkeypatch, capsys):
    expected = digests(write(model, tmp_path / "calm", runtime))
    num_files = sum(name.endswith("safetensors") for name in expected)
    assert num_files > 4
    first = kill_at(3, monkeypatch)
    with pytest.raises(Killed):
        write(model, tmp_path / "killed", runtime)
    assert len(first) == 3 and not (tmp_path / "killed").exists()
    # One of the complete files is damaged meanwhile.
    damaged = tmp_path / ".killed.writing" / first[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    second = kill_at(None, monkeypatch)
    found = digests(write(model, tmp_path / "killed", runtime))
    assert found == expected and sorted(path.name for path in tmp_path.glob(".killed*")) == []
    assert not set(second) & {first[0], first[2]} and len(second) == num_files - 2
    assert capsys.readouterr().out.count("is kept from an earlier start") == 2


def test_two_exports_into_one_directory_do_not_meet(model, runtime, tmp_path, monkeypatch):
    """The first is in the middle of its files when a second begins, which must not touch them."""
    second = []

    def write_meanwhile(plan, file, values, staging_dir):
        if not second:
            second.append(file.name)
            before = sorted(staging_dir.rglob("*"))
            with pytest.raises(ExportInUse, match=r"there \(\w+ on \S+, process \d+\); .* \(to=\)"):
                write(model, tmp_path / "out", runtime)
            assert sorted(staging_dir.rglob("*")) == before
        write_export_file(plan, file, values, staging_dir)

    monkeypatch.setattr(write_module, "write_export_file", write_meanwhile)
    write(model, tmp_path / "out", runtime)
    first = digests(tmp_path / "out")
    write(model, tmp_path / "out", runtime)
    assert second and digests(tmp_path / "out") == first
    assert not list(tmp_path.glob(".out*"))


def errors_of_another_user(destination):
    """What another user without rights of the super-user gets who exports to `destination`; empty for no error."""
    answer, told = os.pipe()
    if os.fork() == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            with exclusive_export_lock(destination):
                pass
        except BaseException as error:  # noqa: BLE001 - the tests must not go on in this process
            os.write(told, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(told)
    os.wait()
    with os.fdopen(answer) as pipe:
        return pipe.read()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_lock_of_another_user_holds_while_that_user_exports_and_no_longer(mode):
    directory = Path(tempfile.mkdtemp())  # pytest's own directories are closed to other users
    try:
        directory.chmod(mode)
        lock = directory / ".out.lock"
        with exclusive_export_lock(directory / "out"):
            error = errors_of_another_user(directory / "out")
            assert "ExportInUse" in error and f"(root on {socket.gethostname()}, process {os.getpid()})" in error
            stale = lock.read_bytes()
        assert errors_of_another_user(directory / "out") == ""
        lock.write_bytes(stale)  # as a kill -9 leaves it
        lock.chmod(0o666)
        assert errors_of_another_user(directory / "out") == ""
        assert lock.exists() is (mode == 0o1777), "there a user cannot remove what others have made"
        lock.write_bytes(b"")
        lock.chmod(0o600)  # as earlier versions made it
        assert "this lock file of root cannot be opened" in errors_of_another_user(directory / "out")
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("change", ["checkpoint", "base", "type", "link", "stale"])
def test_next_start_of_another_export_keeps_nothing(change, model, runtime, tmp_path, monkeypatch):
    model.origin = {"checkpoints": ["a"], "base": {"base/model.safetensors": "1"}}
    kill_at(3, monkeypatch)
    with pytest.raises(Killed):
        write(model, tmp_path / "export", runtime)
    staging = tmp_path / ".export.writing"
    settings = {}
    others = tmp_path / "others"
    others.write_bytes(b"of somebody else")
    if change == "checkpoint":
        model.origin["checkpoints"] = ["b"]
    if change == "base":
        model.origin["base"] = {"base/model.safetensors": "2"}
    if change == "type":
        settings["dtype"] = "bfloat16"
    if change == "link":  # of a downloaded run
        next(staging.glob("*.safetensors")).unlink()
        (staging / "config.json").symlink_to(others)
    if change == "stale":  # what an earlier start wrote beside the weights goes, and the weights stay
        (staging / "papers").mkdir()
        (staging / "papers" / "datasheet.md").touch()
    written = kill_at(None, monkeypatch)
    directory = write(model, tmp_path / "export", runtime, **settings)
    complete = len(list(directory.glob("*.safetensors")))
    assert len(written) == (complete - 3 if change == "stale" else complete)
    assert others.read_bytes() == b"of somebody else" and not (directory / "papers").exists()
    assert not (directory / RECORDS_DIR_NAME).exists() and not staging.exists()


def test_files_are_dealt_by_their_bytes():
    sizes = [5, 5, 5, 1, 1, 3, 4]
    files = [ExportFile(f"{number}", [ExportTensor("t", size, 0)]) for number, size in enumerate(sizes)]
    for writers in (1, 2, 3, 9):
        shares = [files_of_writer(files, writer, writers) for writer in range(writers)]
        assert sorted(file.name for share in shares for file in share) == [file.name for file in files]
        loads = [sum(file.num_bytes for file in share) for share in shares]
        assert max(loads) <= sum(sizes) / writers + max(sizes)


@pytest.mark.parametrize(("free_files", "expected"), [(100, 4), (2, 2), (0, 1), (None, 4)])
def test_a_host_with_little_memory_has_fewer_writers(free_files, expected, model, monkeypatch):
    """Each rank is asked as it would ask: the answers of the others are those of this one."""
    plan = plan_files(ModelValues(model), torch.float32, PER_FILE)
    free = None if free_files is None else free_files * plan.process_bytes
    monkeypatch.setattr(write_module, "free_host_memory_bytes", lambda: free)
    able = []
    for rank in range(4):
        runtime = Runtime(rank, 4, rank, 4, torch.device("cpu"), None, simulated=True)
        able.append(bool(write_module._writer_ranks(plan, runtime)))
    assert able == [rank < expected for rank in range(4)]


def words_of(folder: Path) -> list[str]:
    model = tiny_model_dir(folder / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    words = [f"model.path={model}", f"data.path={write_chat_data(folder / 'train.jsonl', 8)}", "optim.lr=1e-2"]
    words += [f"data.cache_dir={folder / 'cache'}", "batch.global=4", "batch.micro=2", "budget.steps=2"]
    return [*words, "logging.wandb=disabled", "run.device=cpu", "export.max_shard_gib=3e-5"]


def test_ranks_of_a_run_and_processes_of_the_verb_write_the_same_files(tmp_path, capfd):
    """Two ranks at the end of a run, one process later, and two."""
    words = [*words_of(tmp_path), "strategy=fsdp2", "launcher.processes=2", "optim.ema_decay=0.9"]
    words += ["checkpoint.every_steps=1", "checkpoint.save_final=false", "export.verify=true"]
    run = tmp_path / "run"
    assert command_warm(["train", *words, f"run.dir={run}"]) == 0
    said = capfd.readouterr().out
    assert "written by 2 of 2 processes" in said and "export verified" in said
    expected = {name: found for name, found in digests(run / "export").items() if name.endswith("safetensors")}
    assert len(expected) > 3
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert command_here(["export", str(run), f"to={alone}", "--verify"]) == 0
    said = capfd.readouterr().out
    assert "compared with the weights of step-000002, computed here on the CPU in fp32" in said
    assert command_warm(["export", str(run), f"to={together}", "launcher.processes=2", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["model"] == str(together)
    for directory in (alone, together):
        found = digests(directory)
        assert {name: found[name] for name in found if name.endswith("safetensors")} == expected
    assert digests(together).keys() == digests(alone).keys() == digests(run / "export").keys()


def test_checkpoint_that_is_written_for_the_export_alone_does_not_stay(tmp_path, capsys):
    words = [*words_of(tmp_path), "checkpoint.save_final=false", "budget.steps=5"]
    run = tmp_path / "run"
    assert command_here(["train", *words, "checkpoint.every_steps=2", f"run.dir={run}"]) == 0
    # Nor does it take the place of an older one: `checkpoint.keep` is 2.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert (run / "export" / "config.json").is_file() and "checkpoint step-000005" in capsys.readouterr().out
    assert find_checkpoint(run, "auto", CheckpointConfig()).name == "step-000004"
    assert "the run chose step 5 for its export, whose checkpoint is not there any more" in capsys.readouterr().out


def test_checkpoint_that_was_not_exported_stays(tmp_path, capsys):
    """A gate says no, and names the command for later, which needs the checkpoint."""
    words = [*words_of(tmp_path), "checkpoint.save_final=false", "budget.steps=3", "checkpoint.every_steps=2"]
    run = tmp_path / "run"
    assert command_here(["train", *words, 'gates={train/loss: "<0.1"}', f"run.dir={run}"]) == 0
    assert "not exported, since 1 of 1 gates failed" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_training_of_a_pipeline_leaves_a_checkpoint_to_its_export_job(tmp_path):
    words = [*words_of(tmp_path), "checkpoint.save_final=false", "launcher=slurm"]
    settings = {}
    for parts in ("[train]", "[train,export]"):
        config = compose_config([*words, f"launcher.pipeline={parts}"]).config
        settings[parts] = loop_settings(config, total_steps=2)
    assert not settings["[train]"].save_final and settings["[train]"].save_for_export
    assert settings["[train,export]"].save_final and not settings["[train,export]"].save_for_export


def test_run_without_room_for_its_last_checkpoint_says_what_to_do(tmp_path, capsys, monkeypatch):
    """The disk is full after the checkpoint of step 2: nothing is exported, and the run is done."""

    class Full(atomic_io.Disk):
        def open(self, path, flags):
            if "step-000003" in str(path):
                raise OSError(28, "No space left on device", str(path))
            return super().open(path, flags)

    monkeypatch.setattr(atomic_io, "disk", Full())
    words = [*words_of(tmp_path), "checkpoint.save_final=false", "budget.steps=3"]
    run = tmp_path / "run"
    assert command_here(["train", *words, "checkpoint.every_steps=2", f"run.dir={run}"]) == 0
    said = capsys.readouterr().out
    assert "not exported: there is no checkpoint of step 3" in said and f"shardtune export {run}" in said
    assert not (run / "export").exists()
    assert "no checkpoint of step 3" in json.loads((run / "run.json").read_text())["export_problem"]
    shutil.rmtree(run)


@pytest.mark.parametrize(("code", "stays"), [(130, False), (75, False), (70, True)])
def test_export_that_was_stopped_leaves_no_settings_behind(code, stays, tmp_path, monkeypatch):
    """Its directory holds the run's settings; after a failure it also has the record of it, which the message names."""
    directories = []

    def ended(config, job_dir, sha256, *, program):
        directories.append(job_dir)
        return code

    monkeypatch.setattr(supervisor, "run_supervised", ended)
    job = ExportJob(run=str(tmp_path), checkpoints=[], to=str(tmp_path / "out"))
    with pytest.raises(ExportProcessesFailed, match="failed" if stays else "were stopped"):
        export_in_processes(compose_config(words_of(tmp_path)).config, job, 2)
    assert directories[0].exists() == stays
    shutil.rmtree(directories[0], ignore_errors=True)


@pytest.mark.parametrize("verb", ["train", "export"])
def test_ctrl_c_names_no_temporary_directory(verb, tmp_path, capsys):
    assert supervisor.record_run_outcome(tmp_path, 130, supervisor.state_before_start(tmp_path), verb=verb) == 130
    said = capsys.readouterr().err
    assert ("files of the model that are complete are kept" in said) == (verb == "export")
    assert (str(tmp_path) in said) == (verb == "train")
