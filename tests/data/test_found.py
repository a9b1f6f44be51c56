"""Mistakes that were found by using the product, each with the behaviour that is right."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.helpers.launching import ended
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, PrivacyConfig, PrivacyMode
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.preview import summary_text

KEYS = ("the first secret key", "the second secret key")
SLOW = """
import os, signal, time
from trainer.data.worker import ordered_map
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as trainer.stopping.signals.StopRequest does
def slow(item):
    time.sleep(0.05 if item < 3 else 2)
    return os.getpid(), bytes(1 << 20)
class Item(int):
    def __reduce__(self):
        return made, (int(self), bytes(1 << 20))
def made(number, ballast):
    return number
for pid, _ in ordered_map(slow, map(Item, range(12)), workers=2):
    print(pid, flush=True)
"""

CUT_OFF = """
import os, signal, time
from multiprocessing.connection import Connection
from strategies.errors import ShardtuneError
from trainer.data.worker import ordered_map
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
def half(self, data):
    os.write(self.fileno(), bytes(data)[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
def dies(item):
    if item == 2:
        Connection._send = half
    return bytes(50000)
try:
    print(len(list(ordered_map(dies, range(9), workers=2))))
except ShardtuneError as error:
    print(error, flush=True)
def hangs(item):
    if item:
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(3600 if item > 1 else 0.5)
        os.kill(os.getpid(), signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
blocks = ordered_map(hangs, range(9), workers=2)
next(blocks)
signal.sigwait({signal.SIGUSR1})
time.sleep(1)
blocks.close()
print("left off")
"""


def test_pseudonyms_are_others_with_another_key(tmp_path, monkeypatch):
    # Found: the key was no part of the fingerprint, so that a new key opened what the old one had made.
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "write to ann@example.com", "completion": "I will do that."}])
    privacy = PrivacyConfig(mode=PrivacyMode.pseudonymise)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), privacy=privacy)

    def prepared(settings):
        made = Preparation(settings, tiny_tokenizer(), DataSpec(), seed=1).open_or_prepare()
        return made.directory, made.report["cached"], tiny_tokenizer().decode(made.train.sample(0).input_ids)

    seen = []
    for key in (*KEYS, KEYS[0]):
        monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", key)
        seen.append(prepared(config))
    assert "ann@example.com" not in seen[0][2] + seen[1][2]
    assert seen[0][2] != seen[1][2] and seen[0][2] == seen[2][2]
    assert [cached for _, cached, _ in seen] == [False, False, True]
    redacting = replace(config, privacy=replace(privacy, mode=PrivacyMode.redact))
    first = prepared(redacting)
    monkeypatch.setenv("SHARDTUNE_PSEUDONYM_KEY", KEYS[1])
    assert prepared(redacting)[0] == first[0], "a key that is not used is no part of the data"


@pytest.mark.parametrize(("mode", "verb"), [("report", "kept"), ("redact", "replaced")])
def test_summary_says_what_became_of_personal_data(tmp_path, mode, verb):
    # Found: what had been replaced was said to be kept.
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "write to ann@example.com", "completion": "I will do that."}])
    privacy = PrivacyConfig(mode=PrivacyMode(mode))
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), privacy=privacy)
    report = Preparation(config, tiny_tokenizer(), DataSpec(), seed=1).open_or_prepare().report
    assert f"{verb}, privacy: EMAIL: 1" in summary_text(report)


@pytest.fixture
def preparing():
    """A process whose two workers are busy, at the head of its own group; and the number of one of its workers."""
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    yield child, int(child.stdout.readline())
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def test_preparation_workers_end_at_two_interrupts(preparing):
    # Found: the second one broke the wait for the workers, which then waited for work without end.
    child, worker = preparing
    for _ in range(2):
        time.sleep(0.2)
        os.killpg(child.pid, signal.SIGINT)
    assert child.wait(timeout=seconds(20)) != 0
    until = time.monotonic() + seconds(20)
    while not ended(worker) and time.monotonic() < until:  # it is told to, and ends a moment later
        time.sleep(0.05)
    assert ended(worker)


def test_preparation_worker_that_is_killed_ends_the_others(preparing):
    # Found: the others, who had inherited SIGTERM blocked, did not end when the pool told them to, and it waited.
    child, worker = preparing
    time.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    _, said = child.communicate(timeout=seconds(20))
    assert child.returncode != 0 and "data.workers" in said


def test_preparation_worker_killed_at_a_bad_moment_hangs_nobody():
    # Found: amid handing over, or while what it had made before was still looked at and then no more was wanted.
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF], capture_output=True, text=True, check=False, timeout=seconds(30)
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert "data.workers" in first and last == "left off"
