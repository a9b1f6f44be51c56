"""The loss of written answers: TRL's numbers in both layouts and any micro-batches, and what TRL does not have, by hand."""

import json
import math

import numpy as np
import pytest
import torch

from tests.golden.make_grpo import ADVANTAGES, CASES, FILE, LONGEST, NOW, OLD, REFERENCE, answers, logps
from tests.golden.make_preference_vectors import fill, fingerprints, model_config
from trainer.config.run import RunConfig
from trainer.data.config import Layout
from trainer.losses.fuse import install_loss_head
from trainer.losses.next_token import LossHead
from trainer.losses.row_logps import row_logps
from trainer.objectives.answers import AnswerCollator, AnswerSample
from trainer.objectives.base import ReferenceModels
from trainer.objectives.grpo import grpo_problems, settings_without_effect
from trainer.objectives.grpo_config import (
    Baseline,
    ClipForm,
    GrpoConfig,
    ImportanceLevel,
    KlConfig,
    KlEstimator,
    KlPlace,
    Normalise,
    Scale,
)
from trainer.objectives.policy import Policy
from trainer.objectives.rollouts import IdleGroups, RolloutConfig
from trainer.rollout.groups import answer_weights

RECORDED = json.loads(FILE.read_text())["cases"]
NORMALISE = {"dapo": Normalise.token, "cispo": Normalise.token, "grpo": Normalise.answer, "dr_grpo": Normalise.constant}
SLOTS = [[0, 3, 4, 5], [2, 1]]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings_of(case: dict) -> GrpoConfig:
    """TRL's words of a case in ours."""
    estimator = KlEstimator.k3_corrected if case.get("use_bias_correction_kl") else KlEstimator.k3
    return GrpoConfig(
        normalise=NORMALISE[case["loss_type"]],
        importance_level=ImportanceLevel(case.get("importance_sampling_level", "token")),
        clip=case.get("epsilon", 0.2),
        clip_high=case.get("epsilon_high"),
        clip_negative=case.get("delta"),
        clip_form=ClipForm.cispo if case["loss_type"] == "cispo" else ClipForm.ppo,
        kl=KlConfig(weight=case.get("beta", 0.0), estimator=estimator),
        rollout=RolloutConfig(max_new_tokens=LONGEST, temperature=case.get("temperature", 1.0)),
    )


def model(phase: float = NOW):
    from transformers import LlamaForCausalLM

    made = fill(LlamaForCausalLM(model_config()), phase)
    install_loss_head(made, made.config)
    return made.double()


def samples(config: GrpoConfig, *, has_old: bool = True) -> tuple[list[AnswerSample], dict[str, float]]:
    """The recorded answers with what a round gives them, and the counts of the step."""
    temperature = config.rollout.temperature
    rows = answers()
    lengths = np.array([len(answer) for _, answer in rows])
    weights, count = answer_weights(lengths, config.normalise, config.rollout.max_new_tokens)
    by_phase = {phase: logps(phase, temperature) for phase in (NOW, OLD, REFERENCE)}
    made = []
    for number, (prompt, answer) in enumerate(rows):
        ids = np.array(prompt + answer, np.int32)
        entries = {
            "advantages": np.full(len(answer), ADVANTAGES[number]),
            "loss_weights": np.full(len(answer), weights[number]),
            "writer_logps": np.array(by_phase[OLD if has_old else NOW][number]),
            "reference_logps_by_token": np.array(by_phase[REFERENCE][number]),
        }
        if has_old:
            entries["old_logps"] = np.array(by_phase[OLD][number])
        made.append(AnswerSample(ids, np.arange(len(ids)) >= len(prompt), {}, per_token_entries=entries))
    return made, {"loss": count, "tokens": float(lengths.sum()), "answers": float(len(rows))}


def step(config: GrpoConfig, layout: Layout, *, has_old: bool = True, blank: bool = False):
    """(the step's terms, each divided by its count; the model with its gradients), in micro-batches of 4 and 2 answers."""
    rows, totals = samples(config, has_old=has_old)
    objective = Policy(config, ReferenceModels())
    collator = AnswerCollator(layout, pad_token_id=0)
    tuned = model()
    micro_batches = [[rows[number] for number in slot] for slot in SLOTS]
    if blank:  # a rank that has no answer left takes part all the same
        micro_batches.append([collator.without_targets(rows[0])])
    sums: dict[str, float] = {}
    for micro_batch in micro_batches:
        terms = objective.terms(tuned, {**collator(micro_batch), "totals": totals})
        assert terms.keys() == {"loss", *objective.metrics}
        (terms["loss"] / totals["loss"]).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / totals["loss"]
    return sums, tuned


@pytest.mark.parametrize("layout", [Layout.padded, Layout.padding_free])
@pytest.mark.parametrize("name", CASES)
def test_loss_metrics_and_gradients_are_those_of_trl(name, layout):
    case, expected = CASES[name], RECORDED[name]
    config = settings_of(case)
    sums, tuned = step(config, layout, has_old=case.get("old", True), blank=layout is Layout.padding_free)
    # Terms of both signs nearly cancel in some cases: what is left is compared with what there was.
    assert sums["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    for metric, value in expected["metrics"].items():
        by_answer = config.importance_level is ImportanceLevel.sequence and metric.startswith("clip")
        corrected = config.kl.estimator is KlEstimator.k3_corrected and metric == "kl"
        if by_answer or corrected:  # TRL counts answers and corrects the metric too; here both are means over tokens
            continue
        assert sums[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
    found = fingerprints(tuned)
    assert found.keys() == expected["gradients"].keys()
    for key, (norm, product) in expected["gradients"].items():
        assert found[key][0] == pytest.approx(norm, rel=1e-5), key
        assert found[key][1] == pytest.approx(product, abs=1e-5 * norm * math.sqrt(2)), key


def test_the_recorded_cases_differ_and_bounds_hold_some_tokens():
    losses = [RECORDED[name]["loss"] for name in CASES]
    assert len({round(loss, 6) for loss in losses}) == len(CASES)
    assert RECORDED["dapo"]["metrics"]["clip_ratio/low_mean"] > 0
    assert (
        RECORDED["dapo"]["metrics"]["clip_ratio/high_mean"]
        > RECORDED["higher bound"]["metrics"]["clip_ratio/high_mean"]
    )


def test_losses_that_trl_has_not_equal_plain_arithmetic_in_float64():
    """k2 in the loss, no bound at all with plain sums (RLOO), and a divergence in the reward, which leaves the loss alone."""
    by_phase = {phase: logps(phase, 1.0) for phase in (NOW, OLD, REFERENCE)}

    def expected(config: GrpoConfig) -> float:
        total, num_tokens = 0.0, 0
        for number, advantage in enumerate(ADVANTAGES):
            for now, old, reference in zip(*(by_phase[phase][number] for phase in (NOW, OLD, REFERENCE)), strict=True):
                ratio = math.exp(now - old)
                bounded = min(max(ratio, 0.8), 1.2)
                loss = -ratio * advantage
                if config.clip_form is ClipForm.ppo:
                    loss = -min(ratio * advantage, bounded * advantage)
                if config.kl.place is KlPlace.loss:
                    loss += config.kl.weight * (reference - now) ** 2 / 2
                total += loss
                num_tokens += 1
        return total / (len(ADVANTAGES) if config.normalise is Normalise.sum else num_tokens)

    for config in (
        GrpoConfig(kl=KlConfig(weight=0.3, estimator=KlEstimator.k2)),
        GrpoConfig(clip_form=ClipForm.none, normalise=Normalise.sum),
        GrpoConfig(kl=KlConfig(weight=0.3, place=KlPlace.reward)),
    ):
        sums, _ = step(config, Layout.padding_free)
        assert sums["loss"] == pytest.approx(expected(config), rel=1e-5, abs=1e-6)
        assert ("kl" in sums) is (config.kl.weight > 0)


def test_the_gradient_of_k2_is_that_of_the_reverse_divergence_and_k3s_is_not():
    """Averaged over all tokens, weighed by the policy itself. k3's gradient is that of the forward divergence there."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(-1)
    now = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((now.exp() * (now - reference)).sum(), logits, retain_graph=True)
    from trainer.objectives.policy import _kl_estimates

    found = {}
    for estimator in (KlEstimator.k2, KlEstimator.k3):
        estimates = _kl_estimates(reference - now, torch.ones_like(now), estimator)
        (found[estimator],) = torch.autograd.grad((now.detach().exp() * estimates).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found[KlEstimator.k2], wanted)
    assert (found[KlEstimator.k3] - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probabilities_by_row_have_the_values_gradients_and_entropy_of_all_logits(softcap):
    """With a temperature, a factor and a soft cap, for a head that trains and for one that does not."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(11, (7,), generator=generator)
    weights = torch.randn(7, dtype=torch.float64, generator=generator)
    linear = torch.nn.Linear(6, 11, bias=True).double()
    head = LossHead.of_linear(linear, softcap=softcap, logit_scale=1.3)
    states = hidden.clone().requires_grad_()
    logits = (states @ linear.weight.T + linear.bias) * 1.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = (logits / 0.7).log_softmax(-1)
    (wanted.gather(1, targets[:, None])[:, 0] * weights).sum().backward()
    expected = [states.grad, linear.weight.grad, linear.bias.grad]
    linear.weight.grad = linear.bias.grad = None
    for trains in (True, False):
        linear.requires_grad_(trains)
        own = hidden.clone().requires_grad_()
        found, entropy = row_logps(head, own, targets, temperature=0.7)
        torch.testing.assert_close(found, wanted.gather(1, targets[:, None])[:, 0])
        torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1))
        (found * weights).sum().backward()
        torch.testing.assert_close(own.grad, expected[0])
        if trains:
            torch.testing.assert_close(linear.weight.grad, expected[1])
            torch.testing.assert_close(linear.bias.grad, expected[2])
    # A head that a tuning method has wrapped makes its logits.
    other, other_entropy = row_logps(torch.nn.Identity(), logits.detach().float(), targets, temperature=0.7)
    torch.testing.assert_close(other.double(), found.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_bounds_of_a_ratio_that_is_always_one_are_told():
    assert settings_without_effect(GrpoConfig()) == []
    told = settings_without_effect(GrpoConfig(clip_high=0.28, importance_level=ImportanceLevel.sequence))
    assert told == ["objective.importance_level=sequence", "objective.clip_high=0.28"]
    assert settings_without_effect(GrpoConfig(clip_high=0.28, rollout=RolloutConfig(iterations=2))) == []


def test_settings_that_do_nothing_or_cannot_be_are_refused():
    def first_of(**settings) -> str:
        return next(iter(grpo_problems(GrpoConfig(**settings), RunConfig())), "")

    assert first_of() == ""
    assert "objective.baseline=group" in first_of(group_size=1)
    assert first_of(group_size=1, baseline=Baseline.batch, scale=Scale.batch_std) == ""
    assert "objective.scale=std" in first_of(group_size=1, baseline=Baseline.none)
    assert first_of(idle_groups=IdleGroups.drop, baseline=Baseline.batch).startswith("objective.idle_groups=drop")
    assert first_of(clip_form=ClipForm.cispo).startswith("objective.clip_high=null")
    assert first_of(clip_form=ClipForm.cispo, clip_high=0.3).startswith("objective.clip_high=0.3")
    assert first_of(clip_form=ClipForm.none, clip_high=0.3).startswith("objective.clip_high=0.3")
    assert first_of(clip_form=ClipForm.none, clip_negative=3.0).startswith("objective.clip_negative=3")
    assert first_of(kl=KlConfig(place=KlPlace.reward, estimator=KlEstimator.k2)).startswith("objective.kl.estimator=k2")
