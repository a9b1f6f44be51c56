"""Every tuning method writes the answers with the weights that it learns with: virtual tokens, prefixes and adapters included."""

from dataclasses import replace

import pytest

from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.helpers.methods import CASES
from tests.helpers.rounds import prompts_of, round_config, round_trainer
from trainer.objectives.policy import SAMPLING_DIFFERENCE_METRIC

ALWAYS = ("lora", "prefix", "adaption_prompt")
"""An adapter in linear layers, keys before every layer's, and attention beside the model's."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods")
    model_dir(path)
    return path


@pytest.mark.parametrize("case", CASES if EVERYTHING else ALWAYS)
def test_answers_are_written_by_the_weights_that_learn(root, runtime, case):
    """In the third step too, when the method has moved. At a rate of 0.02 old weights would be found: 1e-3 to 1 apart."""
    config = round_config(root, root / "llama", "single", micro=16)
    config = replace(config, tuning=CASES[case], optim=replace(config.optim, lr=0.02))
    trainer = round_trainer(config, prompts_of(config), runtime)
    for batch in trainer.loader.steps(0, 3):
        trainer.meter.add(trainer.train_step(batch))
    rows = trainer.meter.flush()
    assert max(row[SAMPLING_DIFFERENCE_METRIC] for row in rows) < 1e-5
    assert min(row["grad_norm"] for row in rows) > 0
