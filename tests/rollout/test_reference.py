"""The reference of a run is the policy as the run began, for each way to begin one, and stays that while the policy moves."""

from dataclasses import replace

import pytest

from tests.helpers.adapters import plain_adapter
from tests.helpers.building import GLOBAL_BATCH, model_dir, run_config
from tests.helpers.methods import CASES
from tests.parity.rounds import LONGEST, VARIANTS, prompt_set, steps_of
from trainer.model.config import Quantisation
from trainer.objectives.rollouts import RolloutConfig
from trainer.optim.config import SgdConfig
from trainer.tuning.base import FullConfig, LoraConfig
from trainer.tuning.config import BottleneckConfig

STARTS = {
    "full": FullConfig(),
    "lora": LoraConfig(rank=4),
    "dora": LoraConfig(rank=4, dora=True),
    "pissa": LoraConfig(rank=4, init="pissa"),
    "olora": LoraConfig(rank=4, init="olora"),
    "tuning.from": LoraConfig(rank=8, alpha=8),
    "model.adapters": LoraConfig(rank=4),
    "nf4": LoraConfig(rank=4),
    "nf4, tuning.from": LoraConfig(rank=8, alpha=8),
    "bottleneck": BottleneckConfig(size=4),
    "prompt": CASES["prompt"],
    "prefix": CASES["prefix"],
    "c3a": CASES["peft c3a"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize("start", STARTS)
def test_the_first_round_does_not_diverge_from_the_start_and_the_next_one_does(root, runtime, start):
    model = model_dir(root)
    adapter = plain_adapter(model, root / "adapter", r=8, lora_alpha=8)
    tuning = STARTS[start]
    if "tuning.from" in start:
        tuning = replace(tuning, from_=str(adapter))
    objective = replace(VARIANTS["grpo near its start"], rollout=RolloutConfig(max_new_tokens=LONGEST))
    config = run_config(
        model,
        "single",
        "full",
        micro=GLOBAL_BATCH,
        objective=objective,
        optim=SgdConfig(lr=0.5, momentum=0.0, max_grad_norm=0.0),
    )
    config.tuning = tuning
    if start == "model.adapters":
        config.model.adapters = [str(adapter)]
    if "nf4" in start:
        config.model.quantisation = Quantisation.nf4
    first, second = steps_of(config, prompt_set(root), runtime, num_steps=2)
    assert abs(first["values"]["kl"]) <= 1e-8
    assert second["values"]["kl"] > 1e-8, "the policy has not moved, or its reference has moved with it"
