"""What experiment files say of the GPUs they need, held against the step of the model that they name."""

import pytest

from strategies.tensor_inventory import MemoryKind
from tests.helpers.covering import EVERYTHING, whole
from tests.simulated.experiments import DEALT_EXPERTS, LONG_ROWS, NAMES, simulated_experiment
from tests.simulated.goldens import golden_experiment
from trainer.planner.cost_model import ALL_TO_ALL

CARD = 24 * 2**30
"""Bytes of the GPUs that both files ask for."""
WEIGHTS = {"llama2_7b_lora_fsdp2": 6_738_415_616 / 4, "qwen3_30b_a3b_lora_fsdp2": 30_532_122_624 / 8}
"""Published parameters a rank."""


SMALL = [name for name in NAMES if name not in (*LONG_ROWS, *DEALT_EXPERTS)]
BARS = [
    # Experiment, more words, GiB of tensors of a rank, GiB of pinned memory of a rank.
    ("llama3_8b_1m_lora_fsdp2", [], 25.3, 32),
    ("llama3_8b_1m_lora_fsdp2", ["strategy.offload_activations=false"], 56.3, 0),
    ("llama3_8b_1m_full_fsdp2", [], 39.7, 32),
    ("llama3_8b_3m_lora_fsdp2", [], 66.5, 32 * 4),
]
"""What docs/long-context.md says of H100s with 79.18 GiB."""
FORWARD = 32 * 2 * 128 * (2 * 32 + 2 * 8)
"""Bytes of an exchange for each token of a slice: layers, bf16, width of a head, queries and outputs, keys and values."""


@whole("another experiment is simulated below; test_row_sharing.py shows that such a plan holds what the step holds")
@pytest.mark.parametrize(("name", "words", "tensors", "pinned"), BARS)
def test_a_million_tokens_fit_eight_cards(name, words, tensors, pinned):
    found = simulated_experiment(name, *words)
    assert round(found.peak_bytes / 2**30, 1) <= tensors
    assert found.host_inputs.pinned_size() == pinned * 2**30
    (exchange,) = [each for key, each in found.collective_totals.items() if key[0].startswith(ALL_TO_ALL)]
    tokens = {"1m": 2**20, "3m": 3 * 2**20}[name.split("_")[2]]
    # Forward, once more where blocks are recomputed, and gradients.
    assert exchange == (32 * 4 * 3, 3 * FORWARD * tokens // 8)
    if not words and (row := golden_experiment(name)) is not None:
        assert [str(found.peak_phase), found.peak_bytes] == row, "numbers moved: see tests/simulated/goldens.py"


@pytest.mark.parametrize("name", SMALL[: None if EVERYTHING else 1])
def test_the_step_fits_the_cards_that_the_experiment_names(name):
    found = simulated_experiment(name)
    assert WEIGHTS[name] * 2 < found.resting_bytes_by_kind[MemoryKind.parameters] < WEIGHTS[name] * 2 * 1.05, (
        "16 bits each, and adapters"
    )
    assert found.peak_bytes < 0.85 * CARD
    assert found.num_host_reads == 0
    if (row := golden_experiment(name)) is not None:
        assert [str(found.peak_phase), found.peak_bytes] == row, (
            "numbers moved: see tests/simulated/goldens.py and docs/gpu.md"
        )


@whole("tests/simulated/test_dealt_experts.py shows the exchanges of a tiny mixture")
def test_experts_that_do_not_fit_are_dealt():
    """What conf/experiment/deepseek_v3_lora_fsdp2.yaml says: an eighth of the experts are gathered, and tokens are sent."""
    name = "deepseek_v3_lora_fsdp2"
    found = simulated_experiment(name)
    assert found.resting_bytes_by_kind[MemoryKind.parameters] > 671e9 * 2 / 64
    assert round(found.peak_bytes / 2**30, 1) <= 38.5
    assert found.num_host_reads == 58 * 2, "a layer of experts waits for its counts, and again where it is recomputed"
    if (row := golden_experiment(name)) is not None:
        assert [str(found.peak_phase), found.peak_bytes] == row, "numbers moved: see tests/simulated/goldens.py"
