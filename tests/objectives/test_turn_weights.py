"""Weights of turns in the loss: against plain transformers, whose logits are made whole and whose rows are weighed by hand."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.building import GLOBAL_BATCH, model_dir, run_config, take_steps, trainer_for
from tests.helpers.covering import chosen, values
from tests.helpers.tokenizers import WORDS, write_jsonl
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.config import DataConfig, Layout, SourceConfig
from trainer.data.prepare import Preparation
from trainer.data.store.sequences import exact_sum
from trainer.evaluation.loss import LossEvaluator
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.sft import SftDataSpec
from trainer.optim.config import AdamwConfig

LAYOUTS = {
    "padding_free": DataConfig(layout=Layout.padding_free),
    "padded": DataConfig(layout=Layout.padded),
    "packed": DataConfig(packing=True, max_length=96),
}
WEIGHTS = (0.3, 1, 0, 0.001, 0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("weights"))


def rows(num: int, *, weighted: bool | None) -> list[dict]:
    """Conversations of one to three exchanges; weights of all kinds, of 1, or (None) none."""
    generator, words = np.random.default_rng(0), WORDS.split()
    made = []
    for number in range(num):
        turns = []
        for exchange in range(1 + number % 3):
            asked, answer = (" ".join(generator.choice(words, generator.integers(1, 7))) for _ in range(2))
            weight = {} if weighted is None else {"weight": WEIGHTS[(number + exchange) % 5] if weighted else 1}
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **weight}]
        if weighted and all(turn["weight"] == 0 for turn in turns[1::2]):
            turns[-1]["weight"] = 0.5
        made.append({"messages": turns})
    return made


def prepared(tmp_path, model, made, name="data", **settings):
    write_jsonl(tmp_path / f"{name}.jsonl", made)
    config = DataConfig(path=str(tmp_path / f"{name}.jsonl"), cache_dir=str(tmp_path / name), **settings)
    return Preparation(config, load_tokenizer(ModelConfig(path=str(model))), SftDataSpec(), seed=1).open_or_prepare()


class Plain:
    """The model of transformers, and tokens and weights from the text as a person would write it."""

    def __init__(self, model) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def sums(self, row) -> tuple[torch.Tensor, float, float]:
        """Weighed loss and correct argmaxes of a conversation, and the sum of the weights of its targets."""
        text, spans = "", []
        for turn in row["messages"]:
            text += f"<|im_start|>{turn['role']}\n"
            begin, text = len(text), f"{text}{turn['content']}<|im_end|>"
            spans.append((begin, len(text), turn.get("weight", float(turn["role"] == "assistant"))))
            text += "\n"
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        weights = torch.zeros(len(found["input_ids"]))
        for number, (first, last) in enumerate(found["offset_mapping"]):
            weights[number] = next((w for begin, end, w in spans if begin <= first and last <= end), 0.0)
        ids = torch.tensor(found["input_ids"])[None]
        logits = self.model(input_ids=ids).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        right = (logits.argmax(-1) == ids[0, 1:]).float()
        return (nll * weights[1:]).sum(), float(right @ weights[1:]), float(weights[1:].double().sum())


@pytest.mark.parametrize(("layout", "micro"), chosen(itertools.product(LAYOUTS, (4, GLOBAL_BATCH)), values))
def test_turn_weights_loss_and_gradient_are_those_of_transformers(tmp_path, runtime, model, layout, micro):
    made = rows(48, weighted=True)
    data = prepared(tmp_path, model, made, max_length=96)
    plain = Plain(model)
    changes = {"data": LAYOUTS[layout], "optim": AdamwConfig(lr=0.0, max_grad_norm=1e9)}
    if layout == "packed":
        changes["batch"] = {"global": 4, "micro": micro // 4}
    trainer = trainer_for(run_config(model, "single", "full", micro=micro, steps=3, **changes), data, runtime)
    plans = [trainer.loader.plan(step * trainer.loader.share.global_batch) for step in range(3)]
    found = take_steps(trainer, 3)
    for plan, (loss, norm) in zip(plans, found, strict=True):
        chosen = [made[int(data.train.documents[number])] for slot in plan[0] for number in slot]
        plain.model.zero_grad()
        sums = [plain.sums(row) for row in chosen]
        expected = sum(total for total, _, _ in sums) / sum(weight for _, _, weight in sums)
        expected.backward()
        gradient = torch.cat([p.grad.flatten() for p in plain.model.parameters() if p.grad is not None])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-4)
        unweighed = sum(total for total, _, _ in [plain.sums({"messages": ones(row)}) for row in chosen]).detach()
        count = sum(weight for _, _, weight in [plain.sums({"messages": ones(row)}) for row in chosen])
        assert abs(loss - float(unweighed / count)) > 1e-3, "weights make no difference here"


def ones(row):
    """The same turns, those that are learned with the weight 1."""
    return [{**turn, "weight": float(turn["weight"] > 0)} if "weight" in turn else turn for turn in row["messages"]]


@pytest.mark.parametrize("batch", [1, 7])
def test_turn_weights_count_in_evaluation(tmp_path, runtime, model, batch):
    made = rows(20, weighted=True)
    data = prepared(tmp_path, model, made)
    trainer = trainer_for(run_config(model, "single", "full", micro=4), data, runtime)
    sums = [Plain(model).sums(row) for row in made]
    weight = sum(weight for _, _, weight in sums)
    count = exact_sum(data.train.counts["loss"])
    assert count == pytest.approx(weight, rel=1e-7) and count < data.train.num_supervised.sum()

    def batches():
        return eval_batches(data.train, EvalShare(batch, 0, 1), trainer.loader.collator, "cpu")

    found = dict(LossEvaluator(batches, loss_denominator=count).run(trainer.engine))
    assert found["eval/loss"] == pytest.approx(float(sum(total.detach() for total, _, _ in sums)) / weight, rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(sum(right for _, right, _ in sums) / weight, rel=1e-5)


def test_turn_weights_of_a_step_may_sum_to_less_than_one(tmp_path, runtime, model):
    """A denominator below 1 is one like any other."""
    made = rows(16, weighted=True)
    for row in made:
        row["messages"] = [*row["messages"][:1], {**row["messages"][1], "weight": 0.002}]
    data = prepared(tmp_path, model, made)
    trainer = trainer_for(run_config(model, "single", "full", micro=4, steps=1), data, runtime)
    assert 0 < exact_sum(data.train.counts["loss"]) < 1
    for row in made:
        row["messages"][1].pop("weight")
    whole = prepared(tmp_path, model, made, "whole")
    same = trainer_for(run_config(model, "single", "full", micro=4, steps=1), whole, runtime)
    ((loss, norm),), ((right, right_norm),) = take_steps(trainer, 1), take_steps(same, 1)
    assert loss == pytest.approx(right, rel=1e-5) and norm == pytest.approx(right_norm, rel=1e-4)


def test_weight_1_is_no_weight_to_the_last_bit(tmp_path, runtime, model):
    curves = []
    for name, weighted in (("none", None), ("ones", False), ("some", True)):
        data = prepared(tmp_path, model, rows(48, weighted=weighted), name)
        trainer = trainer_for(run_config(model, "single", "full", micro=4, steps=3), data, runtime)
        (batch,) = trainer.loader.steps(0, 1)
        assert any("target_weights" in micro for micro in batch.micro_batches) is bool(weighted)
        assert isinstance(batch.totals["loss"], float if weighted else int)
        assert batch.supervised_tokens == sum(len(micro["target_rows"]) for micro in batch.micro_batches)
        curves.append(take_steps(trainer, 3))
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("weighted", [None, True])
def test_the_loss_of_each_source_is_that_of_transformers(tmp_path, runtime, model, weighted):
    """In every step, out of the same pass, and without moving the loss by a bit."""
    made = {"ward": rows(30, weighted=weighted), "web": rows(12, weighted=weighted)}
    sources = {name: SourceConfig(path=str(write_jsonl(tmp_path / f"{name}.jsonl", own))) for name, own in made.items()}
    config = DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"))
    data = Preparation(config, load_tokenizer(ModelConfig(path=str(model))), SftDataSpec(), seed=1).open_or_prepare()
    settings = run_config(model, "single", "full", micro=4, steps=3, optim=AdamwConfig(lr=0.0))
    trainer, told = trainer_for(settings, data, runtime), Plain(model)
    plans = [trainer.loader.plan(step * GLOBAL_BATCH) for step in range(3)]
    for batch in trainer.loader.steps(0, 3):
        trainer.meter.add(trainer.train_step(batch))
    found = trainer.meter.flush()
    for plan, row in zip(plans, found, strict=True):
        chosen = [int(data.train.documents[number]) for slot in plan[0] for number in slot]
        parts = {"ward": [n for n in chosen if n < 30], "web": [n - 30 for n in chosen if n >= 30]}
        assert all(parts.values())
        for name, numbers in parts.items():
            sums = [told.sums(made[name][number]) for number in numbers]
            expected = sum(float(total.detach()) for total, _, _ in sums) / sum(weight for _, _, weight in sums)
            assert row[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
    again = trainer_for(settings, data, runtime)
    again.loader.source_name_by_number = {}
    assert take_steps(again, 3) == [(row["loss"], row["grad_norm"]) for row in found]
    assert not any("row_source" in micro for batch in again.loader.steps(0, 1) for micro in batch.micro_batches)
