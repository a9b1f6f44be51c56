"""The reader of verbs' own words: what people really mistype, and what is said about it."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from launch.config.verb_arguments import (
    VerbArguments,
    flag,
    forwarded_settings,
    help_rows,
    option,
    positional,
    positionals,
    read_arguments,
    read_setting_group,
)
from launch.export.combine import COMBINATIONS


class Engine(Enum):
    small = "small"
    large = "large"


@dataclass(kw_only=True)
class ExampleArguments(VerbArguments):
    run: Path = positional("name one run, as in shardtune example runs/x")
    question: str | None = positional("put it into quotes", required=False, key="prompt")
    wait_s: float = option("seconds to wait", default=600.0, least=0)
    steps: int | None = option("steps to look at", example="10", above=0)
    share: float = option("of the rows", default=0.5, least=0, most=1)
    merge: bool = option("fold the adapter in", default=True)
    engine: Engine = option("what computes", default=Engine.small, example="small")
    kinds: list[str] = option("what may differ", default=[], choices=("base", "data"), aliases=("run.kinds",))
    gguf: str | None = option("one file more", example="<type>")
    python: str | None = option("what converts it", key="gguf.python", needs="gguf")
    to: str | None = option("where it goes", example="<directory>")
    private: bool | None = option("who sees it", key="hub.private", needs="to=hub:")
    dry_run: bool = flag("say what would be done", needs="to=hub:")
    as_json: bool = flag("for a script", key="--json")


def read(*argv):
    return read_arguments("example", ExampleArguments, argv)


def test_words_get_the_types_of_their_fields():
    words, problems = read(
        "runs/x", "Is 1+1=2?", "wait_s=1e1", "steps=3", "merge=no", "engine=large", "run.kinds=[base, 'data']", "--json"
    )
    assert problems == []
    assert (words.run, words.question, words.wait_s, words.steps) == (Path("runs/x"), "Is 1+1=2?", 10.0, 3)
    assert (words.merge, words.engine, words.kinds, words.as_json) == (False, Engine.large, ["base", "data"], True)
    assert words.text_by_key["kinds"] == "[base, 'data']", "as it was typed, by the usual spelling of its key"
    assert (words.share, words.dry_run, words.gguf) == (0.5, False, None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "run.dir: not set; name one run, as in shardtune example runs/x"),
        (["run.dir="], "run.dir=: run.dir needs a value, as in run.dir=..."),
        (["a", "b", "c"], "a b c: put it into quotes"),
        (["a", "run.dir=b", "c"], "b a c: put it into quotes"),
        (["a", "--dry-rum"], "--dry-rum: there is no such flag; did you mean --dry-run?"),
        (["a", "-f"], "-f: there is no such flag; example takes --dry-run, --json and --help"),
        (["a", "enigne=small"], "enigne=small: there is no such argument; did you mean engine=?"),
        (["a", "to=x", "to=y"], "to=y: to is given twice, as x and y; give one of the two"),
        (["a", "to="], "to=: to needs a value, as in to=<directory>"),
        (["a", "b", "to"], "to: to needs a value, as in to=<directory>"),
        (["a", "wait_s=-1"], "wait_s=-1: must be a number, at least 0"),
        (["a", "wait_s=nan"], "wait_s=nan: must be a number, at least 0"),
        (["a", "steps=0"], "steps=0: must be a whole number above 0"),
        (["a", "steps=1.5"], "steps=1.5: must be a whole number above 0"),
        (["a", f"steps={'9' * 400}"], "must be a whole number above 0"),
        (["a", "share=2"], "share=2: must be a number from 0 to 1"),
        (["a", "merge=maybe"], "merge=maybe: must be true or false"),
        (["a", "engine=larg"], "engine=larg: must be one of small, large; did you mean large?"),
        (["a", "kinds=[base,date]"], "kinds=[base,date]: must be one of base, data; did you mean data?"),
        (["a", "gguf.python=py"], "gguf.python=py: goes with gguf=<type>; add that, or leave gguf.python out"),
        (["a", "to=here", "--dry-run"], "--dry-run: goes with to=hub:; add that, or leave --dry-run out"),
        (["a", "to=here", "hub.private=no"], "hub.private=no: goes with to=hub:"),
    ],
)
def test_a_word_that_cannot_be_used_is_named(argv, said):
    _, problems = read(*argv)
    assert len(problems) == 1, "nothing else is wrong with it"
    assert said in problems[0]


def test_verb_words_problems_are_reported_together():
    _, problems = read("--fast", "steps=x", "colour=red", "hub.private=yes")
    assert [problem.partition(":")[0] for problem in problems] == [
        "--fast",
        "colour=red",
        "steps=x",
        "run.dir",
        "hub.private=yes",
    ]


def test_a_bare_word_may_contain_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2e-4").mkdir()
    words, problems = read("lr=2e-4", "https://wandb.ai/team/runs/a?nw=1")
    assert (str(words.run), words.question, problems) == ("lr=2e-4", "https://wandb.ai/team/runs/a?nw=1", [])
    words, problems = read("a", "say this: " + "long " * 200)
    assert problems == [] and words.question is not None and words.question.startswith("say this")


@dataclass(kw_only=True)
class PassingArguments(VerbArguments):
    run: Path | None = positional("name one", required=False)
    files: list[Path] = positionals()
    against: str | None = option("the other one", example="base")
    adapter: str | None = option("on top", needs="model.path")
    settings: list[str] = forwarded_settings()


def test_settings_are_handed_on_and_misspelt_words_of_the_verb_are_not():
    argv = ["evaluation.tasks=[a,b]", "strategy=fsdp2", "runs/x", "a.json", "b.json", "against=base", "data.path=a b"]
    words, problems = read_arguments("passing", PassingArguments, argv)
    assert problems == []
    assert read_arguments("passing", PassingArguments, ["optim.lr=1"])[1] == []
    assert words.settings == ["evaluation.tasks=[a,b]", "strategy=fsdp2", "data.path=a b"]
    assert (words.run, words.files) == (Path("runs/x"), [Path("a.json"), Path("b.json")])
    _, problems = read_arguments("passing", PassingArguments, ["agianst=base", "--cfg", "adapter=x"])
    assert problems == [
        "agianst=base: there is no such argument; did you mean against=?",
        "--cfg: there is no such flag; passing takes --help",
        "adapter=x: goes with model.path=...; add that, or leave adapter out",
    ]
    assert read_arguments("passing", PassingArguments, ["model.path=m", "adapter=x"])[1] == []


def test_the_field_of_a_list_is_no_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, problems = read_arguments("passing", PassingArguments, ["a", "files", "settings", "files=b"])
    assert (words.files, words.settings, problems) == ([Path("files"), Path("settings")], ["files=b"], [])


@dataclass(kw_only=True)
class DashedArguments(VerbArguments):
    cfg: str | None = option("what is shown", key="--cfg", aliases=("-c",), choices=("job", "all"))
    shard: str | None = option("one of n parts", key="--shard", example="0/8")
    settings: list[str] = forwarded_settings(forwards_unknown_flags=True)


@pytest.mark.parametrize(
    ("argv", "cfg", "shard", "settings"),
    [
        (["--cfg", "all", "a=1"], "all", None, ["a=1"]),
        (["--cfg", "a=1"], "job", None, ["a=1"]),
        (["-c"], "job", None, []),
        (["--cfg=all", "--shard", "0/8", "my.yaml"], "all", "0/8", ["my.yaml"]),
        (["--shard=1/8", "--model.path=m"], None, "1/8", ["--model.path=m"]),
    ],
)
def test_a_dashed_word_takes_the_next_argument(argv, cfg, shard, settings):
    words, problems = read_arguments("dashed", DashedArguments, argv)
    assert (words.cfg, words.shard, words.settings, problems) == (cfg, shard, settings, [])
    _, problems = read_arguments("dashed", DashedArguments, ["--cfg=jbo", "--shard"])
    assert problems == [
        "--shard=: --shard needs a value, as in --shard=0/8",
        "--cfg=jbo: must be one of job, all; did you mean job?",
    ]


def test_help_shows_each_word_and_flag_in_columns():
    rows = help_rows(ExampleArguments).splitlines()
    assert "  wait_s=600        seconds to wait" in rows
    assert "  gguf=<type>       one file more" in rows
    assert "  kinds=[]          what may differ" in rows
    assert rows[-1] == "  --json            for a script"
    assert not any("runs/x" in row for row in rows), "a bare word is in the line that says usage"


@dataclass(kw_only=True, slots=True)
class GroupConfig:
    port: int = 8000
    name: str | None = None
    engine: Engine = Engine.small
    kinds: list[Engine] = field(default_factory=list)
    batching: bool = False


def test_verb_settings_group_is_read_by_its_annotations():
    words = ["serve.port=0", "serve.name=null", "serve.engine=large", "serve.kinds=[small,large]", "other=1", "serve=2"]
    settings, others, problems = read_setting_group("serve", GroupConfig(name="a"), words)
    assert settings == GroupConfig(port=0, engine=Engine.large, kinds=[Engine.small, Engine.large])
    assert (others, problems) == (["other=1", "serve=2"], [])
    assert read_setting_group("serve", GroupConfig(), ["serve.kinds=small"])[0].kinds == [Engine.small], (
        "brackets may be left out"
    )
    twice = ["serve.port=1", "serve.port=2"]
    assert read_setting_group("serve", GroupConfig(), twice)[0].port == 2, (
        "as in the words of a run, the last one counts"
    )
    assert read_setting_group("serve", GroupConfig(), twice, refuse_repeated=True)[2] == [
        "serve.port=2: serve.port is given twice; give one"
    ]
    _, _, problems = read_setting_group(
        "serve", GroupConfig(), ["serve.prot=1", "serve.port=x", "serve.zzz=1", "serve.name="]
    )
    assert problems == [
        "serve.prot=1: there is no setting serve.prot; did you mean serve.port?",
        "serve.port=x: must be a whole number",
        "serve.zzz=1: there is no setting serve.zzz; one of serve.port, serve.name, serve.engine, serve.kinds, "
        "serve.batching",
        "serve.name=: serve.name needs a value",
    ]


def test_verb_ways_to_combine_adapters_are_those_of_the_trainer():
    from trainer.export.combine import Combination

    assert tuple(Combination) == COMBINATIONS
