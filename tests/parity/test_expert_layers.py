"""One layer of experts over ranks makes what all experts make in one process, for every architecture that has experts."""

import pytest

from tests.helpers.covering import EVERYTHING
from tests.models import sweep

EXACT = 1e-5
TABLE = sweep.read()["types"]
FAMILIES = sorted(name for name, row in TABLE.items() if "experts" in row.get("kinds", ()))
UNLIKE = ("gpt_oss", "nemotron_h")
"""One is transposed and has biases, the other has no gates. Of the other architectures most are like `qwen3_moe`."""
REFUSED = ("dbrx", "inkling_text", "jetmoe", "llama4", "llama4_text", "longcat_flash")
"""They compute experts, of inkling_text those that take all tokens, by code of their own, to which no tokens can be sent."""


@pytest.mark.parametrize("kind", ("spread", "to one rank", "none", "beyond", "chunks"))
@pytest.mark.parametrize("degree", (2, 4))
def test_one_layer_makes_what_the_whole_layer_makes(ranks, kind, degree):
    assert max(ranks[4].ask("expert_layers", "layer", kind, degree, "whole")) < EXACT


@pytest.mark.parametrize("kind", ("spread", "to one rank"))
@pytest.mark.parametrize("degree", (2, 4))
def test_one_layer_makes_what_the_exchange_of_transformers_makes(ranks, kind, degree):
    assert max(ranks[4].ask("expert_layers", "layer", kind, degree, "transformers")) < EXACT


@pytest.mark.parametrize("name", FAMILIES if EVERYTHING else UNLIKE)
def test_experts_of_every_architecture_compute_alike_over_ranks_or_are_refused(ranks, name):
    """All architectures of `tests/models/table.json` that have experts. Those that are refused are told what to set."""
    found = ranks[4].ask("expert_layers", "family", name, 4)
    assert bool(found["problems"]) == (name in REFUSED)
    for problem in found["problems"]:
        assert problem.startswith(f"parallel.experts=4: model.path={name} ")
        assert problem.endswith("set parallel.experts=1")
    assert found["problems"] or found["differences"]
    for differences in found["differences"].values():
        assert max(differences) < EXACT
