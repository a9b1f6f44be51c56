"""What a comparison says of a run that exports an earlier step than its last one."""

from types import SimpleNamespace

import pytest

from launch.compare.exported_step import earlier_export_text


@pytest.mark.parametrize(
    ("evaluated", "text"),
    [
        ({4: 1.5, 16: 1.8}, "step 4, with eval/loss 1.5000 (1.8000 at the last step, 16)"),
        ({4: 1.5, 12: 1.7}, "step 4, with eval/loss 1.5000 (the last step is 16)"),
        ({}, "step 4 (the last step is 16)"),
    ],
    ids=["both evaluated", "the last step not evaluated", "nothing evaluated"],
)
def test_value_of_the_last_step_is_that_of_its_own_evaluation(evaluated, text):
    run = SimpleNamespace(
        record=SimpleNamespace(exported_checkpoint={"step": 4, "which": "best"}, outcome=None),
        config={},
        steps={step: {} for step in range(1, 17)},
        evaluations={step: {"eval/loss": loss} for step, loss in evaluated.items()},
    )
    assert earlier_export_text(run) == text
