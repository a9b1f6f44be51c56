"""What `table.json` says of each architecture holds, and says enough. `make test` runs a covering choice of its rows."""

import json
from importlib.metadata import version

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.covering import chosen, takes
from tests.helpers.ranks import Ranks
from tests.models import gradients, job, stock, sweep, tiny
from tests.models.own import EXCLUDED, VARIANTS

TABLE = sweep.read()["types"]
TRIED = {model_type: row for model_type, row in TABLE.items() if model_type not in EXCLUDED}
KNOWN = version("transformers") == sweep.read()["versions"]["transformers"]
MOST_REFUSED = {"full": 0.05, "lora": 0.05, "fsdp2 full": 0.1, "zero3 full": 0.1}
"""Share of all architectures that may not train, by case."""
pytestmark = pytest.mark.skipif(not KNOWN, reason="table.json is of another transformers: python -m tests.models.sweep")


def trains(model_type, case):
    """Whether the table says so."""
    return TABLE[model_type].get(case, {}).get("outcome") in sweep.TRAINS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{number of ranks: `Ranks`}."""
    found = {
        world: Ranks(sweep.JOB, world, tmp_path_factory.mktemp(f"models{world}"), also="deepspeed" if world > 1 else "")
        for world in (1, 2)
    }
    yield found
    for some in found.values():
        some.stop()


def alone_marks(model_type):
    """What one process must meet: each kind of layer, each attention, each sentence of a refusal."""
    row = TABLE[model_type]
    return {*row.get("kinds", ()), *((t, row[t]["outcome"], row[t].get("attention")) for t in sweep.TUNINGS)}


def together_marks(case):
    """What two ranks must meet: each case, and each kind of layer where every block is gathered for itself, or every weight."""
    model_type, strategy, tuning = case
    return {(strategy, tuning), *(kind for kind in TABLE[model_type]["kinds"] if strategy != "zero2")}


@pytest.mark.parametrize("model_type", chosen(TRIED, alone_marks))
def test_sweep_table_holds_for_one_process(ranks, model_type):
    found = sweep.kept(ranks[1].ask("single", model_type, limit_s=sweep.LIMIT_S))
    assert found == {name: value for name, value in TABLE[model_type].items() if name in found}


@pytest.mark.parametrize(
    ("model_type", "strategy", "tuning"),
    chosen(
        [(t, s, u) for t in TRIED for s, u in sweep.together(t) if trains(t, f"{s} {u}")],
        together_marks,
        takes,
    ),
)
def test_sweep_table_holds_for_several_ranks(ranks, model_type, strategy, tuning):
    found = sweep.kept({"": ranks[2].ask("ranks", model_type, strategy, tuning, limit_s=sweep.LIMIT_S)})[""]
    assert found == TABLE[model_type][f"{strategy} {tuning}"]


def test_every_architecture_is_in_the_table():
    assert sorted(TABLE) == sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])
    assert sorted(TRIED) == sorted([*tiny.causal_types(), *VARIANTS])
    assert all(TABLE[model_type] == sweep.excluded(model_type) for model_type in EXCLUDED)


@pytest.mark.parametrize("case", list(MOST_REFUSED))
def test_sweep_table_has_few_architectures_that_do_not_train(case):
    assert sum(trains(t, case) for t in TABLE) >= (1 - MOST_REFUSED[case]) * len(TABLE)


def test_sweep_table_has_a_message_for_whatever_does_not_train():
    bad = [line for t, row in TABLE.items() for line in sweep.lines(t, row) if " | refused | ConfigError: " not in line]
    assert not bad


def test_sweep_reports_a_routing_tie():
    with stock.Choices() as choices:
        torch.tensor([[0.5, 0.2, 0.2, 0.1]]).topk(1)
        assert choices.gap > job.GAP
        torch.tensor([[0.5, 0.2, 0.2, float("-inf")]]).topk(3)
        assert choices.gap > job.GAP  # what is masked is not passed over
        torch.topk(torch.tensor([[0.5, 0.2, 0.2, 0.1]]), 2)
    assert choices.gap == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model, saved."""
    directory = tmp_path_factory.mktemp("llama")
    tiny.tiny_model("llama").save_pretrained(directory)
    return directory


def test_the_oracle_is_the_mean_over_supervised_tokens(llama):
    """By arithmetic on the plain model's logits."""
    samples = stock.documents()[:3]
    model, losses = stock.stock_model(llama), []
    for sample in samples:
        ids = torch.tensor(sample.input_ids.astype("int64"))
        with torch.no_grad():
            logs = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-float(logs[i - 1, ids[i]]) for i in range(1, len(ids)) if sample.supervised[i]]
    assert stock.compute(llama, samples).loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


class Tuning:
    """Full tuning, as far as comparing asks for it."""

    base_name = staticmethod(str)


class Built:
    tuning = Tuning()


def test_sweep_reports_a_difference_in_one_gradient(llama):
    oracle = stock.compute(llama, stock.documents()[:2])
    found = {name: gradient.clone() for name, gradient in oracle.gradients.items()}
    assert gradients.compare_gradients(found, {}, oracle, Built()) == 0
    found["model.layers.0.self_attn.q_proj.weight"] *= 1 + 2e-5
    with pytest.raises(gradients.Differs, match=r"layers\.0\.self_attn\.q_proj"):
        gradients.compare_gradients(found, {}, oracle, Built())


@pytest.mark.parametrize(
    ("model_type", "setting", "value"),
    [
        ("mistral", "sliding_window", tiny.WINDOW + 1),
        ("llama4_text", "attention_chunk_size", tiny.WINDOW + 1),
        ("gemma2", "attn_logit_softcapping", None),
        ("granite", "logits_scaling", tiny.FACTOR + 0.1),
        ("mixtral", "num_experts_per_tok", 1),
        ("falcon_h1", "ssm_in_multiplier", 1.4),
        ("mamba2", "time_step_limit", [0.0, 0.01]),
    ],
)
def test_the_documents_show_each_setting(tmp_path, model_type, setting, value):
    """What would be passed over unseen, if documents were short or weights near zero."""
    tiny.tiny_model(model_type).save_pretrained(tmp_path)
    oracle = stock.compute(tmp_path, stock.documents())
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    assert settings[setting] != value
    file.write_text(json.dumps(settings | {setting: value}))
    other = stock.compute(tmp_path, stock.documents())
    with pytest.raises(gradients.Differs):
        gradients.compare_gradients(other.gradients, {}, oracle, Built())
