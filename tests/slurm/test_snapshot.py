"""The copy of the code that a job runs: what is in it, that it is as it was made, and when it is made anew."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import snapshot
from strategies.errors import ConfigError
from trainer.reporting.code_revision import code_revision

CLONE = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    clone = tmp_path / "clone"
    for part in ("conf", "launch"):
        shutil.copytree(CLONE / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CLONE / "strategies", clone / "strategies")
    shutil.copytree(CLONE / "trainer" / "reporting", clone / "trainer" / "reporting")
    shutil.copy(CLONE / "trainer" / "__init__.py", clone / "trainer")
    (clone / "slurm").mkdir()
    (clone / "slurm" / "env.sh").write_text("export SITE=here\n")
    return clone


def test_code_snapshot_imports_by_itself_and_says_where_it_is_from(clone: Path, tmp_path: Path) -> None:
    git = ["git", "-C", str(clone), "-c", "user.name=me", "-c", "user.email=me@lab"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    place = snapshot.copy_code(tmp_path / "run", clone)
    assert place == snapshot.code_copy_dir(tmp_path / "run", snapshot.code_digest(snapshot.read_code(clone)))
    assert (place / "slurm/env.sh").read_text() == "export SITE=here\n" and not list(place.rglob("__pycache__"))
    shutil.rmtree(clone)
    head = code_revision(place)
    assert head and len(head) == 12, head
    code = "from trainer.reporting.code_revision import CODE_DIRECTORY, code_revision; print(CODE_DIRECTORY, code_revision())"
    said = subprocess.run([sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(place)}, capture_output=True)
    assert said.stdout.decode().split() == [str(place), head], said.stderr


def test_code_snapshot_of_other_code_is_another_and_the_last_one_is_in_use(clone: Path, tmp_path: Path) -> None:
    """An array's tasks may still run the earlier one, when one of its runs is submitted again."""
    first = snapshot.copy_code(tmp_path / "run", clone)
    made = (first / "launch" / "main.py").stat().st_ino
    (clone / "launch" / "__pycache__").mkdir()
    (clone / "launch" / "__pycache__" / "main.pyc").write_bytes(b"x")
    assert snapshot.copy_code(tmp_path / "run", clone) == first and (first / "launch" / "main.py").stat().st_ino == made
    before = (clone / "launch" / "main.py").read_text()
    (clone / "launch" / "main.py").write_text("changed = True\n")
    second = snapshot.copy_code(tmp_path / "run", clone)
    assert (
        sorted(second.parent.iterdir()) == sorted([first, second])
        and snapshot.newest_code_copy(tmp_path / "run") == second
    )
    assert (second / "launch" / "main.py").read_text() == "changed = True\n"
    snapshot.refuse_changed_code(first)
    (clone / "launch" / "main.py").write_text(before)
    assert snapshot.copy_code(tmp_path / "run", clone) == first and snapshot.newest_code_copy(tmp_path / "run") == first


def test_code_snapshot_that_was_changed_is_refused_and_made_anew_at_submission(clone: Path, tmp_path: Path) -> None:
    place = snapshot.copy_code(tmp_path / "run", clone)
    snapshot.refuse_changed_code(place)
    snapshot.refuse_changed_code(clone)
    (place / "launch" / "main.py").unlink()
    with pytest.raises(ConfigError, match="changed since the job was submitted"):
        snapshot.refuse_changed_code(place)
    assert snapshot.copy_code(tmp_path / "run", clone) == place
    snapshot.refuse_changed_code(place)
    assert json.loads((place / "CODE.json").read_text())["source"] == str(clone)
