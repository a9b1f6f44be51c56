"""KTO: TRL's numbers, the answers of others, what rows become, and a reference point that is the whole step's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.main import main
from strategies.errors import DataError
from tests.golden.make_preference_vectors import fill, fingerprints, model_config
from tests.golden.make_teacher_vectors import FILE, KTO, answers
from tests.helpers.building import GLOBAL_BATCH, collate, model_dir, rated_set, run_config, trainer_for
from tests.helpers.launching import clean_environment
from tests.helpers.stores import write
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl, write_pairs
from trainer.build.parts import prepare_data
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.config import DataConfig, DataFormat, Layout
from trainer.data.prepare import Preparation
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.evaluation.loss import LossEvaluator
from trainer.losses.fuse import install_loss_head
from trainer.objectives.kto import MAX_PARTNER_DISTANCE, KtoConfig, mismatched_sample, partner_index
from trainer.objectives.reference import RecordLogps
from trainer.objectives.registry import build_objective, data_spec_of

RECORDED = json.loads(FILE.read_text())["cases"]
DATA_SPEC = data_spec_of(KtoConfig())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data_of(path: Path, rows: list[tuple[list[int], list[int], bool]]) -> TokenDataset:
    made = []
    for prompt, answer, verdict in rows:
        ids = np.array(prompt + answer, np.int32)
        made.append(Sample(ids, np.arange(len(ids)) >= len(prompt), {"desirable": int(verdict)}))
    write(path, made, DATA_SPEC.counts, {"fingerprint": "rated"})
    return TokenDataset.open(path)


def model(phase: float):
    from transformers import LlamaForCausalLM

    made = fill(LlamaForCausalLM(model_config()), phase)
    install_loss_head(made, made.config)
    return made


def recorded(samples: list[Sample], phase: float) -> dict:
    """A padded batch with what the model of `phase` says of it."""
    with torch.no_grad():
        logps = RecordLogps().terms(model(phase), collate(samples, Layout.padded))["logps"]
    for sample, value in zip(samples, logps, strict=True):
        sample.marks["reference"] = float(value)
    return collate(samples, Layout.padded, objective=KtoConfig())


@pytest.mark.parametrize("name", KTO)
def test_kto_loss_and_gradients_are_those_of_trl(tmp_path, name):
    """Loss, reference point, rewards and every gradient of a step of six answers, in micro-batches of four and two."""
    case, expected = KTO[name], RECORDED[name]
    data = data_of(tmp_path / "data", answers())
    settings = {key: value for key, value in case.items() if key not in ("student", "reference")}
    objective, tuned = build_objective(KtoConfig(**settings)), model(case["student"])
    slots = [[0, 3, 4, 5], [2, 1]]
    totals = {term: int(counts.sum()) for term, counts in data.counts.items()}
    ahead = torch.zeros(())
    for slot in slots:
        batch = recorded([mismatched_sample(data, number) for number in slot], case["reference"])
        ahead = ahead + objective.terms(tuned, {**batch, "is_look_ahead": True})["kl"] / len(data)
    sums: dict[str, float] = {}
    for slot in slots:
        batch = recorded([data.sample(number) for number in slot], case["reference"])
        terms = objective.terms(tuned, {**batch, "totals": totals, "step_means": {"kl": ahead}})
        (terms["loss"] / len(data)).backward()
        sums = {term: sums.get(term, 0.0) + float(value.detach()) / len(data) for term, value in terms.items()}
    assert sums["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert sums["kl"] == pytest.approx(expected["kl"], rel=1e-5, abs=1e-6)
    assert sums["desirable_reward"] == pytest.approx(expected["rewards/chosen"], rel=1e-5, abs=1e-6)
    assert sums["undesirable_reward"] == pytest.approx(expected["rewards/rejected"], rel=1e-5, abs=1e-6)
    assert sums["margin"] == pytest.approx(sums["desirable_reward"] - sums["undesirable_reward"], abs=1e-6)
    found = fingerprints(tuned)
    assert found.keys() == expected["gradients"].keys()
    for key, (norm, product) in expected["gradients"].items():
        assert found[key][0] == pytest.approx(norm, rel=1e-5), key
        assert found[key][1] == pytest.approx(product, abs=1e-5 * norm * math.sqrt(2)), key


def test_the_recorded_cases_differ_enough():
    points = [RECORDED[name]["kl"] for name in KTO]
    assert min(points) == 0 and max(points) > 0.1
    assert len({RECORDED[name]["loss"] for name in KTO}) == len(KTO)


def test_kto_mismatched_answer_is_that_of_another_prompt(tmp_path):
    rows = [
        ([3, 4], [9], True),
        ([5, 6], [10, 11], True),
        ([5, 6], [12], False),
        ([5, 6], [13], False),
        ([7], [14], True),
    ]
    data = data_of(tmp_path / "data", rows)
    assert [partner_index(data, number) for number in range(5)] == [4, 0, 0, 0, 3]
    found = mismatched_sample(data, 2)
    assert found.input_ids.tolist() == [5, 6, 9] and found.supervised.tolist() == [False, False, True]
    assert found.marks == {}


def test_mismatched_sequences_are_no_longer_than_the_longest(tmp_path):
    data = data_of(tmp_path / "data", [(list(range(3, 13)), [20], True), ([3], list(range(20, 28)), False)])
    assert mismatched_sample(data, 0).input_ids.tolist() == [*range(3, 13), 20]
    same = data_of(tmp_path / "same", [([3], [10 + number], True) for number in range(MAX_PARTNER_DISTANCE + 9)])
    assert partner_index(same, 70) == 69 and partner_index(same, 0) == len(same) - 1


def prepared(tmp_path: Path, rows: list[dict], **changes) -> TokenDataset:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **changes)
    return Preparation(config, tiny_tokenizer(), DATA_SPEC, seed=0).open_or_prepare().train


def learned(data: TokenDataset) -> list[tuple[str, bool]]:
    tokenizer = tiny_tokenizer()
    samples = [data.sample(number) for number in range(len(data))]
    return [
        (tokenizer.decode(s.input_ids[s.supervised], skip_special_tokens=True).strip(), s.marks["desirable"])
        for s in samples
    ]


def test_kto_thumbs_keep_their_verdict(tmp_path):
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    ]
    rows = [
        {"prompt": "q", "completion": "good", "thumbs": "up"},
        {"prompt": "r", "completion": "bad", "thumbs": "down"},
    ]
    assert learned(prepared(tmp_path, rows)) == [("good", True), ("bad", False)]
    data = prepared(tmp_path, [{"messages": talk, "label": False}])
    assert learned(data) == [("two", False)]  # the earlier answer is context
    assert {term: counts.tolist() for term, counts in data.counts.items()} == {
        "loss": [1],
        "desirable": [0],
        "undesirable": [1],
    }


def test_kto_pair_is_two_answers(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(2)]
    data = prepared(tmp_path, rows)
    assert learned(data) == [("good 0", True), ("bad 0", False), ("good 1", True), ("bad 1", False)]
    assert [partner_index(data, number) for number in range(4)] == [3, 3, 1, 1]
    assert (
        prepared(tmp_path, rows, max_length=len(data.sample(0).input_ids) - 4).num_supervised.sum()
        < data.num_supervised.sum()
    )


def test_rows_without_a_verdict_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: has no label that objective=kto can use"):
        prepared(tmp_path, [{"prompt": "q", "completion": "a"}], format=DataFormat.prompt_completion)


@pytest.mark.parametrize(
    ("thumbs", "said"), [("up", "or learn these with objective=sft"), ("down", "add desirable ones")]
)
def test_kto_answers_of_one_kind_are_refused(tmp_path, thumbs, said):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "thumbs": thumbs} for n in range(3)]
    config = RunConfig(objective=KtoConfig())
    config.data.path, config.data.cache_dir = str(write_jsonl(tmp_path / "rows.jsonl", rows)), str(tmp_path / "cache")
    with pytest.raises(DataError, match=f"all 3 answers are (un)?desirable, .*{said}"):
        prepare_data(config, tiny_tokenizer())
    rows.append({"prompt": "q", "completion": "a", "thumbs": "down" if thumbs == "up" else "up"})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(prepare_data(config, tiny_tokenizer()).train) == 4


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_kto_reference_point_is_that_of_the_entire_step(tmp_path, runtime, tuning):
    """After steps that moved the model: the mean over the step's sixteen mismatched answers, however they are dealt."""
    config = run_config(model_dir(tmp_path), "single", tuning, micro=2, steps=6, objective=KtoConfig(beta=0.5))
    config.optim.lr = 3e-3
    trainer = trainer_for(config, rated_set(tmp_path), runtime)
    base = trainer_for(config, rated_set(tmp_path), runtime).engine.step_module
    points = []
    for batch in trainer.loader.steps(0, 6):
        chosen = [number for slot in trainer.loader.plan(trainer.progress.samples)[0] for number in slot]
        rows = collate([mismatched_sample(trainer.loader.dataset, n) for n in chosen], Layout.padding_free)
        with torch.no_grad():
            now, before = (RecordLogps().terms(m.model, rows)["logps"] for m in (trainer.engine.step_module, base))
        record = trainer.train_step(batch)
        points.append(float(record.local_sums["kl"]) / GLOBAL_BATCH)
        assert points[-1] == pytest.approx(max(0.0, float((now - before).double().mean())), rel=1e-5, abs=1e-5)
    assert max(points) > 0.05


def test_evaluation_does_not_depend_on_the_batch(tmp_path, runtime):
    config = run_config(model_dir(tmp_path), "single", "lora", micro=4, steps=6, objective=KtoConfig(beta=0.5))
    config.optim.lr = 1e-2
    data = rated_set(tmp_path)
    trainer = trainer_for(config, data, runtime)
    for batch in trainer.loader.steps(0, 6):
        trainer.train_step(batch)
    results = []
    for batch in (1, 5, 48):

        def batches(batch=batch, **more):
            return eval_batches(data.evaluation, EvalShare(batch, 0, 1), trainer.loader.collator, "cpu", **more)

        evaluator = LossEvaluator(
            batches,
            loss_denominator=48,
            perplexity=False,
            ahead=lambda b=batches: b(look_ahead_sample=mismatched_sample),
        )
        results.append(dict(evaluator.run(trainer.engine)))
    assert results[0]["eval/kl"] > 0 and results[0]["eval/loss"] < 0.49
    assert results[0]["eval/margin"] > 0.1
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5, abs=1e-6)


def test_kto_run_and_its_export(tmp_path, monkeypatch):
    """Trained from pairs with an adapter; the evaluation by plain peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    model_dir(tmp_path)
    write_pairs(tmp_path / "train.jsonl", 16)
    write_pairs(tmp_path / "eval.jsonl", 6, seed=1)
    words = "model.path=llama data.path=train.jsonl data.eval_path=eval.jsonl data.cache_dir=cache run.device=cpu tuning=lora "
    words += "objective=kto objective.beta=0.5 batch.global=8 batch.micro=2 budget.steps=4 optim.lr=1e-2 run.dir=run "
    assert main(["train", *words.split(), "logging.wandb=disabled", "evaluation.batch=5"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {"kl", "desirable_reward", "undesirable_reward", "margin", "accuracy"} <= rows[-2].keys()
    config = DataConfig(path="eval.jsonl", cache_dir="cache")
    data = Preparation(config, tiny_tokenizer(), DATA_SPEC, seed=0).open_or_prepare().train
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("llama"), "run/export").eval()
    own, others = [data.sample(n) for n in range(12)], [mismatched_sample(data, n) for n in range(12)]
    now = [log_probabilities(tuned, samples) for samples in (own, others)]
    with tuned.disable_adapter():
        before = [log_probabilities(tuned, samples) for samples in (own, others)]
    ratios, point = now[0] - before[0], (now[1] - before[1]).mean().clamp(min=0)
    sign = torch.tensor([1.0 if s.marks["desirable"] else -1.0 for s in own])
    values = rows[-1]
    assert values["eval/loss"] == pytest.approx(
        float((1 - torch.sigmoid(0.5 * sign * (ratios - point))).mean()), rel=1e-4
    )
    assert values["eval/kl"] == pytest.approx(float(point), rel=1e-4, abs=1e-5)
    assert values["eval/margin"] == pytest.approx(
        float(0.5 * (ratios[sign > 0].mean() - ratios[sign < 0].mean())), rel=1e-4
    )
    assert values["eval/accuracy"] == pytest.approx(float((sign * (ratios - point) > 0).float().mean()))


@torch.no_grad()
def log_probabilities(model, samples: list[Sample]) -> torch.Tensor:
    found = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids, dtype=torch.int64)
        scores = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        found.append(scores[torch.from_numpy(sample.supervised.copy())[1:]].sum())
    return torch.stack(found)
