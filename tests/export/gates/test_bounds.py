"""Gates as they are typed: what they become, and what is said of those that are none."""

import math

import pytest

from launch.config.compose import compose_config
from strategies.errors import ConfigError
from trainer.export.gates.bounds import Bound, gate_problems, parse_bound, parse_gate_argument


@pytest.mark.parametrize(
    ("written", "passes", "fails"),
    [
        ("<2.1", 2.09, 2.1),
        ("<=2.1", 2.1, 2.11),
        (">0.5", 0.51, 0.5),
        (">= 1e-3", 1e-3, 9e-4),
        ("<3%", 0.029, 0.03),
        (0, 0.0, 1e-9),
        ("==0.5", 0.5, 0.4),
        ("<-1", -2, 0),
    ],
)
def test_gate_bound_holds_on_its_side_alone(written, passes, fails):
    bound = parse_bound("m", written)
    assert bound is not None and bound.holds(passes) and not bound.holds(fails) and not bound.holds(math.nan)
    assert bound.badness(fails) > bound.badness(passes)


@pytest.mark.parametrize("word", ["about 2", "<", "<2.1.1", True, None, [1], "<inf", "2<"])
def test_gate_word_that_is_no_bound_is_refused_with_an_example(word):
    (line,) = gate_problems({"eval/loss": word})
    assert line.startswith(f"gates: eval/loss: {word}") and '"<2.1"' in line


@pytest.mark.parametrize(
    ("word", "gates"),
    [
        (
            'gates={eval/loss: "<2.1", memorised: 0, bias/gap: "<0.05"}',
            {"eval/loss": "<2.1", "memorised": 0, "bias/gap": "<0.05"},
        ),
        ("gates={eval/loss:<2.1,memorised:0}", {"eval/loss": "<2.1", "memorised": 0}),
        ("gates={forgetting: <3%}", {"forgetting": "<3%"}),
        ("gates.eval/loss=<2.1", {"eval/loss": "<2.1"}),
        ("gates.override='we: agreed'", {"override": "we: agreed"}),
    ],
)
def test_words_with_and_without_quotes(word, gates):
    assert parse_gate_argument(word) == gates


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    facts = ["evaluation.tasks.facts.kind=exact_match", "evaluation.tasks.facts.path=train.jsonl"]
    return ["model.path=m", "data.path=train.jsonl", "data.eval_share=0.1", "budget.steps=1", *facts]


def test_gates_do_not_change_the_identity_of_the_run(words):
    gated = compose_config([*words, 'gates={eval/loss: "<2.1"}', "gates.memorised=0", 'gates.override="why"'])
    assert gated.config.gates == {"eval/loss": "<2.1", "memorised": "0", "override": "why"}
    assert gated.sha256 == compose_config(words).sha256


def test_gates_problems_are_all_reported_when_the_run_is_composed(words):
    with pytest.raises(ConfigError) as error:
        compose_config([*words, "gates={eval/facts/exact_mach: '>0.5', eval/loss: good}", "gates.override="])
    said = str(error.value)
    assert "the task facts has no such metric; did you mean eval/facts/exact_match?" in said
    assert "gates: eval/loss: good: must be" in said and "gates.override needs a value" in said
    with pytest.raises(ConfigError, match="must be pairs of a metric and its bound"):
        compose_config([*words, "gates=[eval/loss]"])
    compose_config([*words, "gates={bias/gap: '<0.05', eval/facts/exact_match: '>0.5'}"])  # may be measured later


def test_gate_judges_the_worst_of_several_measurements():
    assert Bound("m", "=", 0.0, "0").badness(-3) > Bound("m", "=", 0.0, "0").badness(2)
