"""What experiment files say of the GPUs they need, held against the step of the model that they name."""

import pytest

from strategies.tensor_inventory import MemoryKind
from tests.helpers.covering import EVERYTHING
from tests.simulated.experiments import MODELS, simulated_experiment
from tests.simulated.goldens import golden_experiment

CARD = 24 * 2**30
"""Bytes of the GPUs that both files ask for."""
WEIGHTS = {"llama2_7b_lora_fsdp2": 6_738_415_616 / 4, "qwen3_30b_a3b_lora_fsdp2": 30_532_122_624 / 8}
"""Published parameters a rank."""


@pytest.mark.parametrize("name", [*MODELS][: None if EVERYTHING else 1])
def test_the_step_fits_the_cards_that_the_experiment_names(tmp_path, name):
    found = simulated_experiment(name, tmp_path)
    assert WEIGHTS[name] * 2 < found.resting[MemoryKind.parameters] < WEIGHTS[name] * 2 * 1.05, (
        "16 bits each, and adapters"
    )
    assert found.total < 0.85 * CARD
    assert found.host_reads == 0
    if (row := golden_experiment(name)) is not None:
        assert [str(found.peak), found.total] == row, "numbers moved: see tests/simulated/goldens.py and docs/gpu.md"
