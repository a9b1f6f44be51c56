"""What a start shows of its data: the report and a sample, and one line where a run goes on with the same data."""

import json
from types import SimpleNamespace

import pytest

from launch.config.compose import compose_config
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.session.announcements import open_console

RUNTIME = SimpleNamespace(is_main=True, rank=0, world_size=1)


@pytest.fixture
def shown(tmp_path, capsys):
    """A function that opens the console of a run on 5 documents, and returns what it shows and its data."""
    run_dir = tmp_path / "run"
    config = compose_config(["budget.steps=1", f"run.dir={run_dir}"], check=False).config

    def show(num_rows=5):
        write_jsonl(tmp_path / "train.jsonl", chat_rows(num_rows))
        settings = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
        data = Preparation(settings, tiny_tokenizer(), DataSpec(), seed=1).open_or_prepare()
        open_console(config, run_dir, data, tiny_tokenizer(), RUNTIME)
        return capsys.readouterr().out, data

    return show


def test_a_run_that_goes_on_with_the_same_data_shows_one_line_of_it(shown, tmp_path):
    first, data = shown()
    assert "rows: 5 rows read" in first and "⟦" in first
    (tmp_path / "run" / "run.json").write_text(json.dumps({"version": 1, "data_fingerprint": data.train.fingerprint}))
    without_checkpoint, _ = shown()
    assert without_checkpoint == first, "nothing was trained: it is a first start"

    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    resumed, _ = shown()
    _headline, line = resumed.splitlines()
    audit = data.directory / "audit.html"
    assert line == f"data: as at the first start: 5 documents, {data.report['train']['tokens']} tokens; see {audit}"

    changed, _ = shown(6)
    assert "rows: 6 rows read" in changed and "⟦" in changed
