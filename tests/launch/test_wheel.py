"""A wheel of the project, built and unpacked elsewhere: its own files answer, without the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers.launching import ROOT
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl

VERBS = """
import sys

import launch
from launch.main import main

site, model, data = sys.argv[1:]
assert launch.__file__.startswith(site), launch.__file__
words = [f"model.path={model}", f"data.path={data}", "data.cache_dir=cache", "budget.steps=2"]
for verb in (["--help"], ["init", *words, "to=settings.yaml"], ["prepare", *words]):
    code = main(verb)
    assert code == 0, (verb, code)
"""


def test_wheel_unpacked_elsewhere_answers(tmp_path):
    site = tmp_path / "site"
    unpack_wheel(tmp_path, site)
    data = write_jsonl(tmp_path / "chat.jsonl", chat_rows(24))
    model = tiny_model_dir(tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    command = [sys.executable, "-c", VERBS, str(site), str(model), str(data)]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage: shardtune" in done.stdout
    assert (tmp_path / "settings.yaml").exists()
    [page] = (tmp_path / "cache").rglob("audit.html")
    assert ":root { color-scheme" in page.read_text(encoding="utf-8"), "of a style sheet"
    # Templates, style sheets and lists: pages and cards that were not asked for above are made of them.
    assert beside_the_code(site) == beside_the_code(ROOT)


def beside_the_code(root: Path) -> set[Path]:
    """Files in the packages of a clone, or of a wheel, that are no Python."""
    files = (file for package in ("launch", "strategies", "trainer") for file in (root / package).rglob("*.*"))
    return {file.relative_to(root) for file in files if file.is_file() and file.suffix not in (".py", ".pyc")}


def unpack_wheel(work: Path, site: Path) -> None:
    """Build a wheel of a copy of the clone, as pip does, and unpack it into `site`."""
    copy = work / "copy"
    for folder in ("conf", "launch", "strategies", "trainer", "slurm"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "shardtune.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(work)], cwd=copy, check=True, capture_output=True)
    [wheel] = work.glob("shardtune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
