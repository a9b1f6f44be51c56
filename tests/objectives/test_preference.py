"""Objectives over pairs: TRL's numbers, and what no order, grouping or layout may change."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden.make_preference_vectors import CASES, FILE, fill, fingerprints, model_config, pairs
from tests.helpers.building import GLOBAL_BATCH, collate, model_dir, pair_set, run_config, take_steps, trainer_for
from tests.helpers.covering import chosen, values
from tests.helpers.objectives import variants_of
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.losses.fuse import install_loss_head
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.causal import reference_logps
from trainer.objectives.preference import DpoConfig, OrpoConfig, PairLoss
from trainer.objectives.reference import RecordLogps
from trainer.objectives.registry import FAMILIES, build_objective, data_spec_of
from trainer.tuning.base import LoraConfig

OBJECTIVES = variants_of("dpo", "orpo", "simpo", "reward")
RECORDED = json.loads(FILE.read_text())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(case: dict) -> ObjectiveConfig:
    chosen = {key: value for key, value in case.items() if key != "objective"}
    if "loss_type" in chosen:
        chosen["loss_type"] = PairLoss(chosen["loss_type"])
    return FAMILIES[case["objective"]].settings(**chosen)


def samples() -> list[Sample]:
    made = []
    for prompt, *answers in pairs():
        for place, answer in enumerate(answers):
            ids = np.array(prompt + answer, np.int32)
            made.append(Sample(ids, np.arange(len(ids)) >= len(prompt), {"rejected": place}))
    return made


def model(case: dict, phase: float = 0.0) -> nn.Module:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    if case["objective"] == "reward":
        return fill(LlamaForSequenceClassification(model_config()), phase).double()
    made = fill(LlamaForCausalLM(model_config()), phase)
    install_loss_head(made, made.config)
    return made.double()  # as TRL's were: sums that nearly cancel differ from one processor to another in float32


def batch_of(chosen: list[Sample], case: dict) -> dict:
    """A padded micro-batch, with the other model's log-probabilities where a reference is used."""
    if case["objective"] == "dpo":
        with torch.no_grad():
            batch = collate(chosen, Layout.padded)
            for sample, value in zip(chosen, RecordLogps().terms(model(case, 0.4), batch)["logps"], strict=True):
                sample.marks["reference"] = float(value)
    return collate(chosen, Layout.padded)


@pytest.mark.parametrize("name", CASES)
def test_preference_losses_and_gradients_are_those_of_trl(name):
    """Loss, rewards and every gradient of a step of four pairs."""
    case, expected, num = CASES[name], RECORDED["cases"][name], len(pairs())
    objective, tuned, rows = build_objective(settings(case)), model(case), samples()
    terms = objective.terms(tuned, batch_of(rows, case))
    (terms["loss"] / num).backward()
    assert float(terms["loss"].detach()) / num == pytest.approx(expected["loss"], rel=1e-5)
    chosen, rejected = np.array(expected["chosen"]), np.array(expected["rejected"])
    assert float(terms["chosen_reward"]) == pytest.approx(chosen.sum(), rel=1e-5)
    assert float(terms["rejected_reward"]) == pytest.approx(rejected.sum(), rel=1e-5)
    assert float(terms["margin"]) == pytest.approx((chosen - rejected).sum(), rel=1e-5, abs=1e-5)
    assert float(terms["accuracy"]) == (chosen > rejected).sum()
    found = fingerprints(tuned)
    assert found.keys() == expected["gradients"].keys()
    for key, (norm, product) in expected["gradients"].items():
        assert found[key][0] == pytest.approx(norm, rel=1e-5), key
        assert found[key][1] == pytest.approx(product, abs=1e-5 * norm * math.sqrt(2)), key


def test_the_recorded_pairs_differ_enough():
    """Both preferences occur, and no gradient vanishes; else the comparison could not fail."""
    dpo = RECORDED["cases"]["dpo"]
    better = [c > r for c, r in zip(dpo["chosen"], dpo["rejected"], strict=True)]
    assert any(better) and not all(better)
    losses = [case["loss"] for case in RECORDED["cases"].values()]
    assert len(set(losses)) == len(losses)
    for name, case in RECORDED["cases"].items():
        assert min(norm for norm, _ in case["gradients"].values()) > 1e-6, name


@pytest.mark.parametrize("name", CASES)
def test_preference_sums_do_not_depend_on_the_grouping(name):
    case = CASES[name]
    objective, tuned, rows = build_objective(settings(case)), model(case), samples()
    whole = objective.terms(tuned, batch_of(rows, case))
    parts = [objective.terms(tuned, batch_of(rows[2 * pair : 2 * pair + 2], case)) for pair in (2, 0, 3, 1)]
    for term, value in whole.items():
        total = sum(part[term].detach() for part in parts)
        assert float(total) == pytest.approx(float(value.detach()), rel=1e-5, abs=1e-5), term


@pytest.mark.parametrize("name", CASES)
def test_preference_filler_counts_nothing(name):
    case = CASES[name]
    rows = samples()[:2]
    for sample in rows:
        sample.supervised = np.zeros_like(sample.supervised)
    terms = build_objective(settings(case)).terms(model(case), batch_of(rows, case))
    assert {term: float(value.detach()) for term, value in terms.items()} == dict.fromkeys(terms, 0.0)


def test_preference_pair_counts_once():
    for config in OBJECTIVES.values():
        counts = [data_spec_of(config).counts(sample)["loss"] for sample in samples()]
        assert counts == [1, 0] * len(pairs())


def test_odds_stay_finite_for_certain_answers():
    """A model that has learned an answer by heart has no odds left: neither loss nor gradient may be infinite."""
    from trainer.objectives.preference import Orpo, Pairs

    chosen = torch.tensor([0.0, -1e-9, -3.0], requires_grad=True)
    rejected = torch.tensor([-200.0, -1e-9, 0.0], requires_grad=True)
    one, zero = torch.ones(3), torch.zeros(3)
    losses, _, _ = Orpo(OrpoConfig()).losses(Pairs(chosen, rejected, one, one, zero, zero))
    losses.sum().backward()
    for found in (losses, chosen.grad, rejected.grad):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(("name", "tuning"), chosen(itertools.product(OBJECTIVES, ("lora", "full")), values))
def test_steps_do_not_depend_on_the_micro_batch(tmp_path, runtime, name, tuning):
    objective = OBJECTIVES[name]
    curves = []
    for micro in (GLOBAL_BATCH, 4, 1):
        config = run_config(model_dir(tmp_path), "single", tuning, micro=micro, steps=4, objective=objective)
        curves.append(take_steps(trainer_for(config, pair_set(tmp_path), runtime), 4))
    for other in curves[1:]:
        for found, expected in zip(other, curves[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "tuning", [LoraConfig(rank=4), LoraConfig(rank=4, modules_to_save=["embed_tokens", "lm_head"])]
)
def test_the_adapter_off_is_the_base_model(tmp_path, runtime, tuning):
    """After steps that changed it, the reference is still what the model said before them; and gradients still flow."""
    config = run_config(model_dir(tmp_path), "single", "lora", micro=16, steps=4, objective=DpoConfig(beta=0.5))
    config.tuning = tuning
    trainer = trainer_for(config, pair_set(tmp_path), runtime)
    step = trainer.engine.step_module
    batch = collate([trainer.loader.dataset.sample(i) for i in range(8)], Layout.padding_free)
    before = reference_logps(step.model, batch, step.objective.reference)
    trains = [name for name, p in step.named_parameters() if p.requires_grad]
    take_steps(trainer, 3)
    assert torch.equal(reference_logps(step.model, batch, step.objective.reference), before)
    assert step.training and step.model.training
    with torch.no_grad():
        now = RecordLogps().terms(step.model, batch)["logps"]
    assert (now - before).abs().max() > 1e-2
    assert [name for name, p in step.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_preference_reference_is_recorded_for_an_adapter_that_took_part_of_the_base(tmp_path, runtime, init):
    """Without the adapter the base lacks what was split off it: at the first step the rewards would not be zero."""
    config = run_config(model_dir(tmp_path), "single", "lora", micro=16, steps=1, objective=DpoConfig(beta=0.5))
    config.tuning = LoraConfig(rank=4, init=init)
    trainer = trainer_for(config, pair_set(tmp_path), runtime)
    ((loss, _),) = take_steps(trainer, 1)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def continued(config, data, runtime, path=None):
    """A trainer, the reference recorded or read, and then perhaps the state of `path`."""
    trainer = trainer_for(config, data, runtime)
    if path is not None:
        trainer.progress = trainer.engine.load(path)
    return trainer


def test_a_resumed_run_compares_with_the_first_model(tmp_path, runtime):
    """Full tuning: the reference is that before the first step, read from its file or computed once more."""
    config = run_config(model_dir(tmp_path), "single", "full", micro=4, steps=5, objective=DpoConfig(beta=0.5))
    first = continued(config, pair_set(tmp_path), runtime)
    recorded = first.loader.dataset.marks["reference"].copy()
    take_steps(first, 2)
    path = tmp_path / "state"
    path.mkdir()
    first.engine.state(first.progress).save(path)
    expected = take_steps(first, 3)
    (kept,) = (tmp_path / "pairs-48").glob("run-*/reference/train-*.npy")
    assert np.array_equal(np.load(kept), recorded)

    for state in ("kept", "torn", "gone"):
        if state == "torn":
            kept.write_bytes(kept.read_bytes()[:50])
        elif state == "gone":
            kept.unlink()
        again = continued(config, pair_set(tmp_path), runtime, path)
        assert np.array_equal(again.loader.dataset.marks["reference"], recorded), state
        assert take_steps(again, 3) == expected, state


def test_a_recorded_reference_is_read_and_not_computed(tmp_path, runtime):
    config = run_config(model_dir(tmp_path), "single", "full", micro=4, steps=5, objective=DpoConfig(beta=0.5))
    continued(config, pair_set(tmp_path), runtime)
    (kept,) = (tmp_path / "pairs-48").glob("run-*/reference/train-*.npy")
    np.save(kept, np.load(kept) + 1)
    moved = continued(config, pair_set(tmp_path), runtime).loader.dataset.marks["reference"]
    assert np.array_equal(moved, np.load(kept))
