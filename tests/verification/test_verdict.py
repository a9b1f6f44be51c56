"""What counts as rounding, and what is said beyond."""

import math

import pytest
import torch

from strategies.base import Precision
from trainer.verification.steps import ComparedSteps, TakenStep
from trainer.verification.verdict import verdict_on_steps

KINDS = {"q": "attention", "up": "MLP"}


def step(loss=2.0, q=0.0, up=0.0, **changes):
    """A step whose largest gradients are 1 and 10, with one element of each off by `q` and `up`."""
    gradients = {"q": torch.tensor([1.0, 0.5 + q]), "up": torch.tensor([10.0, 5 + up])}
    settings = {"kinds": KINDS, "kernels": "a kernel", "finite": True}
    return TakenStep(**{"loss": loss, "gradients": gradients, **settings, **changes})


def judged(configured, single=None, half=None):
    compared = [ComparedSteps(Precision.fp32, single or step(), configured)]
    if half is not None:
        compared.append(ComparedSteps(Precision.bf16, *half))
    return verdict_on_steps(compared)


def test_differences_are_shares_of_the_largest_element_of_a_kind():
    found = judged(step(q=9e-6, up=9e-5, loss=2.00001))
    assert found.problems == []
    distance_by_quantity = {row["quantity"]: row["distance"] for row in found.as_json_values()["differences"]}
    assert distance_by_quantity == {
        name: pytest.approx(d, rel=1e-2) for name, d in (("loss", 5e-6), ("attention", 9e-6), ("MLP", 9e-6))
    }


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        (step(loss=2.001), "fp32: loss differs by 5.0e-04 from one process"),
        (step(q=2e-5), "fp32: attention: gradients differ by 2.0e-05"),
        (step(up=math.nan), "fp32: MLP: gradients differ by inf"),
        (step(finite=False), "fp32: as configured, a gradient is no finite number"),
    ],
)
def test_what_lies_beyond_is_named(configured, said):
    found = judged(configured)
    assert any(problem.startswith(said) for problem in found.problems) and not found.as_json_values()["agrees"]


def test_a_kind_without_any_gradient_is_no_agreement():
    nothing = step(gradients={"q": torch.tensor([1.0]), "up": torch.zeros(2)})
    rows = judged(nothing, single=nothing).as_json_values()["differences"]
    assert {row["quantity"]: row["distance"] for row in rows} == {"loss": 0, "attention": 0, "MLP": None}
    silent = step(gradients={"q": torch.zeros(1), "up": torch.zeros(2)})
    assert judged(silent, single=silent).problems == ["no parameter has a gradient, so that nothing was compared"]


def test_in_half_precision_the_bound_is_the_rounding_of_one_process():
    single = step(loss=2.002, q=0.02, up=0.02)
    assert judged(step(), half=(single, step(loss=2.005, q=0.059, up=0.3))).problems == []
    # A kind may be near by chance: MLP is bound by the average of both kinds, 0.011.
    beyond = judged(step(), half=(single, step(q=0.07, up=0.4))).problems
    assert [problem.partition(" by ")[0] for problem in beyond] == [
        "bf16: attention: gradients differ",
        "bf16: MLP: gradients differ",
    ]


def test_the_loss_of_one_process_may_be_right_by_chance():
    single = step(loss=2.0, q=0.02, up=0.02)
    near = step(loss=2.007, q=0.02, up=0.02)
    assert judged(step(), half=(single, near)).problems == []
    far = step(loss=2.009, q=0.02, up=0.02)
    assert [problem.partition(" by ")[0] for problem in judged(step(), half=(single, far)).problems] == [
        "bf16: loss differs"
    ]


def test_choices_of_routers_that_differ_are_noted():
    found = judged(step(expert_tokens=[[4, 2], [3, 3]]), single=step(expert_tokens=[[3, 3], [3, 3]]))
    assert found.notes == ["fp32: 1 choices of routers are others than in one process"]
