"""The date that a chat template writes for today: that of the first preparation, in the fingerprint, kept by runs."""

import json
import shutil
import threading
from datetime import date, datetime

import pytest
import yaml

from launch.config.compose import compose_config, recompose_frozen_config
from launch.config.frozen import load_frozen_config
from launch.runs.freeze import write_run_config
from strategies.errors import ConfigError, Preempted
from strategies.rendezvous import Rendezvous
from tests.faults.runs import Runs
from tests.helpers import tokenizers as make
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.config.run import TEMPLATE_DATE_KEY, settled_template_date
from trainer.data.config import DataConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation, keep_or_first_date
from trainer.data.report.preview import summary_text
from trainer.data.tokens.clock import TemplateDate, reads_clock, replace_clock_calls
from trainer.evaluation.tasks.prepared import TaskContext
from trainer.objectives.sft import SftConfig
from trainer.session.template_date import choose_template_date

DATED = (  # as Llama 3's
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + make.CHATML
)
CHRISTMAS = date(2025, 12, 25)


class Clock(datetime):
    """The clock of transformers' templates, at another day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 3, 12, 30)


@pytest.fixture
def another_day(monkeypatch):
    """Let templates and preparation believe that it is another day."""
    from transformers.utils import chat_template_utils

    from trainer.data import cache

    class Day(date):
        @classmethod
        def today(cls):
            return cls(2026, 1, 3)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(cache, "date", Day)


def rendered(template, day=None):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = template if day is None else replace_clock_calls(template, day)
    texts, _ = render_jinja_template([[{"role": "user", "content": "q"}]], chat_template=source)
    return texts[0]


def preparation(tmp_path, template=DATED, **options):
    if not (tmp_path / "train.jsonl").exists():
        write_chat_data(tmp_path / "train.jsonl", 8)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    return Preparation(config, tiny_tokenizer(template, eos_token="<|im_end|>"), DataSpec(), seed=1, **options)


def text_of(prepared):
    return tiny_tokenizer().decode(prepared.train.sample(0).input_ids)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "25 Dec 2025"),
        ('{%- set today = strftime_now(format="%Y-%m-%d") %}{{ today }}', "2025-12-25"),
        ("\n  {% if strftime_now is defined %}{{ strftime_now('%F') }}{% endif %}", "\n2025-12-25"),
        ("{% set f = '%A, %-d %B' ~ ' %H:%M' %}{{ strftime_now(f) }}", "Thursday, 25 December 00:00"),
        ("\n x{% set clock = strftime_now %}{{ clock('%d') }}", "\n x25"),
    ],
)
def test_template_date_is_that_of_a_clock_that_stands_still(template, written):
    assert reads_clock(template) and rendered(template, CHRISTMAS) == written
    assert not reads_clock(make.CHATML) and replace_clock_calls(make.CHATML, CHRISTMAS) == make.CHATML
    assert rendered(template) != written


def test_template_date_of_the_first_preparation_decides_and_is_in_the_fingerprint(tmp_path, another_day, monkeypatch):
    first = preparation(tmp_path, choose_date=keep_or_first_date(TemplateDate(CHRISTMAS)))
    made = first.open_or_prepare()
    assert "25 Dec 2025" in text_of(made) and made.date == TemplateDate(CHRISTMAS)
    assert "the chat template writes 2025-12-25 for today" in summary_text(made.report)

    here = preparation(tmp_path)
    assert here.fingerprint != first.fingerprint and "03 Jan 2026" in text_of(here.open_or_prepare())
    monkeypatch.undo()  # the next day, in the same cache
    assert preparation(tmp_path).fingerprint == here.fingerprint
    again = preparation(tmp_path).open_or_prepare()
    assert again.report["cached"] and again.date == TemplateDate(date(2026, 1, 3))
    shutil.rmtree(again.directory)  # of a cache that was cleaned: made again, the same
    assert "03 Jan 2026" in text_of(preparation(tmp_path).open_or_prepare())


def test_template_date_is_none_for_a_template_without_a_clock(tmp_path):
    plain = preparation(tmp_path, make.CHATML, choose_date=lambda first: pytest.fail("nobody asks for a date"))
    assert plain.template_date is None and not (tmp_path / "cache" / "dates").exists()
    assert "today" not in summary_text(plain.open_or_prepare().report)


def test_template_date_leaves_data_prepared_by_an_earlier_version_usable(tmp_path, another_day):
    undated = preparation(tmp_path, choose_date=keep_or_first_date(TemplateDate(CHRISTMAS, in_fingerprint=False)))
    before = undated.open_or_prepare()
    known = preparation(tmp_path)
    assert known.fingerprint == undated.fingerprint, "its entry has the fingerprint without a date"
    assert known.open_or_prepare().report["cached"] and not known.template_date.in_fingerprint
    shutil.rmtree(before.directory)
    assert preparation(tmp_path).fingerprint != undated.fingerprint, "what is prepared anew is dated"


class Store(dict):
    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


def test_template_date_of_all_ranks_and_points_is_that_of_the_first(tmp_path):
    config = compose_config(["model.path=m", "data.path=d.jsonl", "budget.steps=1"], check=False).config
    store, found = Store(), {}

    def choose(rank, day, run_dir=None):
        rendezvous = Rendezvous(store, rank, 2, 60.0)
        found[rank] = choose_template_date(config, run_dir, rendezvous, lambda: False, lambda: TemplateDate(day))

    other = threading.Thread(target=choose, args=(1, date(2026, 1, 3)))
    other.start()
    choose(0, CHRISTMAS)
    other.join()
    assert found == {0: TemplateDate(CHRISTMAS), 1: TemplateDate(CHRISTMAS)}
    waiting = Rendezvous(Store(), 1, 2, 60.0)
    with pytest.raises(Preempted):
        choose_template_date(config, None, waiting, lambda: True, lambda: TemplateDate(CHRISTMAS))

    (tmp_path / "comparison.json").write_text("{}")
    alone = Rendezvous(None, 0, 1, 60.0)
    for name, day in (("a", CHRISTMAS), ("b", date(2026, 1, 3))):
        point = choose_template_date(config, tmp_path / name, alone, lambda: False, lambda day=day: TemplateDate(day))
        assert point == TemplateDate(CHRISTMAS), name


def test_template_date_in_evaluation_is_that_of_the_run():
    context = TaskContext.from_settings(DataConfig(), SftConfig(), TemplateDate(CHRISTMAS))
    encoder = context.build_encoder(tiny_tokenizer(DATED))
    assert "25 Dec 2025" in encoder.template.render_text([{"role": "user", "content": "q"}], "here")


def test_template_date_of_a_run_is_kept(tmp_path, another_day, monkeypatch, capsys):
    runs = Runs(tmp_path)
    (runs.root / "dated.jinja").write_text(DATED)
    words = runs.words("run", "budget.steps=2", f"model.chat_template={runs.root / 'dated.jinja'}")[4:]
    assert command_here(["train", *words]) == 0
    assert "the chat template writes 2026-01-03 for today" in capsys.readouterr().out
    run_dir = tmp_path / "run"
    record = json.loads((run_dir / "run.json").read_text())
    assert record["substitutions"][TEMPLATE_DATE_KEY] == "2026-01-03"
    frozen = load_frozen_config(run_dir / "config.yaml")
    assert settled_template_date(frozen) == TemplateDate(date(2026, 1, 3))
    assert settled_template_date(recompose_frozen_config(frozen, [], frozenset())) == settled_template_date(frozen), (
        "evaluate and export have it too"
    )

    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    resumed = compose_config(words)
    write_run_config(resumed, run_dir)
    assert settled_template_date(resumed.config) == TemplateDate(date(2026, 1, 3))

    path = run_dir / "config.yaml"
    noted = yaml.safe_load(path.read_text())
    path.write_text(path.read_text().replace("data.date: '2026-01-03'", "data.date: yesterday"))
    assert noted["substitutions"][TEMPLATE_DATE_KEY] == "2026-01-03"
    with pytest.raises(ConfigError, match=r"'yesterday' in config\.yaml, which is no date"):
        settled_template_date(load_frozen_config(path))


def test_template_date_of_an_earlier_versions_run_is_that_of_its_oldest_file(tmp_path):
    import os

    runs = Runs(tmp_path)
    words = runs.words("run")[4:]
    checkpoint = write_run_config(compose_config(words), tmp_path / "run") / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    christmas = datetime(2025, 12, 25, 12).timestamp()
    os.utime(checkpoint / "progress.json", (christmas, christmas))
    resumed = compose_config(words)
    write_run_config(resumed, tmp_path / "run")
    assert settled_template_date(resumed.config) == TemplateDate(CHRISTMAS, in_fingerprint=False)
