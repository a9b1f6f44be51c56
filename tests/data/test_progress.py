"""Preparation says how far it is, on rank 0, and a request to stop ends its workers amid their work."""

import re
import threading
import time

import pytest

from strategies.errors import Preempted
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.data import prepare
from trainer.data.config import DataConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report import progress
from trainer.data.report.progress import PreparationProgress, print_on_rank_0
from trainer.data.worker import ordered_map


def preparation(tmp_path, num=2000, **options):
    write_chat_data(tmp_path / "train.jsonl", num)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    return Preparation(config, tiny_tokenizer(), DataSpec(), seed=1, **options)


def test_preparation_progress_shows_rows_done_of_how_many_and_their_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    lines, said = [], threading.Event()

    def print_line(line):
        lines.append(line)
        if " rows," in line and not line.startswith("preparing data: 0 "):
            said.set()

    # Before each block the preparation waits until a line was said; so it does not matter how fast it is.
    def wait():
        if made.progress._rows_done:
            assert said.wait(60)
        return False

    made = preparation(tmp_path, print_line=print_line, stop=wait)
    made.open_or_prepare()
    of_rows = [line for line in lines if " rows," in line]
    done, total, rate = re.search(r"([\d,]+) of about ([\d,]+) rows, ([\d,]+) rows/s, \d+ s$", of_rows[-1]).groups()
    assert int(done.replace(",", "")) in (512, 1024, 1536, 2000) and rate
    assert int(total.replace(",", "")) == pytest.approx(2000, rel=0.1)


def test_preparation_progress_is_silent_when_short(tmp_path, capfd):
    preparation(tmp_path, 8).open_or_prepare()
    assert "preparing data" not in "".join(capfd.readouterr())


def test_preparation_progress_of_other_phases_and_other_ranks(monkeypatch, capsys):
    now = [100.0]
    told = PreparationProgress(clock=lambda: now[0])
    now[0] += 45
    told.phase = "writing the reports"
    assert told.progress_line() == "preparing data: writing the reports, 45 s"
    print_on_rank_0(told.progress_line())
    monkeypatch.setenv("RANK", "1")
    print_on_rank_0("another rank")
    assert capsys.readouterr().err == "preparing data: writing the reports, 45 s\n"


def test_preparation_progress_says_when_it_waits_for_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    lines, waits = [], threading.Event()

    def print_line(line):
        lines.append(line)
        if "waiting for another process" in line:
            waits.set()

    monkeypatch.setattr(prepare, "build_once", lambda *_, **__: waits.wait(60) or True)
    with pytest.raises(Exception, match=r"manifest\.json"):  # the other process never came to an end
        preparation(tmp_path, 8, print_line=print_line).open_or_prepare()
    assert "preparing data: waiting for another process that prepares the same data" in lines[-1]


def _stuck(item):
    time.sleep(3600)  # as native code that encodes one long text


def test_preparation_stop_kills_workers_amid_their_work():
    def check():
        raise Preempted("asked to stop")

    began = time.monotonic()
    with pytest.raises(Preempted):
        list(ordered_map(_stuck, range(8), workers=2, while_waiting=check))
    assert time.monotonic() - began < 600, "nobody waited for the workers"


def test_preparation_results_that_are_closed_kill_the_workers():
    def work(item):
        return item if item == 0 else _stuck(item)

    results = ordered_map(work, range(8), workers=2)
    assert next(results) == 0
    results.close()
