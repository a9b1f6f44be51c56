"""Imports without a search for garbage, and libraries that no start needs."""

import gc
import subprocess
import sys

import pytest

from strategies.imports import importing_without_gc

PROGRAM = """
import gc, sys
sys.modules["library_that_is_not_to_be_imported"] = None
from trainer.model.compat import load_models_without_scipy

load_models_without_scipy()
assert "transformers.modeling_utils" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() == 0, "a model that there is would never be freed"
assert not {name.partition(".")[0] for name in sys.modules} & {"scipy", "sklearn", "pandas", "wandb"}

import torch
from transformers.loss import loss_for_object_detection as losses

assert losses.is_scipy_available()
matcher = losses.HungarianMatcher()
output = {"logits": torch.eye(3)[None], "pred_boxes": torch.full((1, 3, 4), 0.5)}
target = {"class_labels": torch.tensor([2, 0]), "boxes": torch.full((2, 4), 0.5)}
(predictions, targets), = matcher(output, [target])
assert sorted(zip(predictions.tolist(), targets.tolist())) == [(0, 1), (2, 0)]
assert "scipy" in sys.modules
"""


def test_models_are_loaded_without_scipy_and_detection_finds_it_when_it_is_called():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_garbage_is_looked_for_again_after_an_import_that_fails(monkeypatch):
    kept = []
    monkeypatch.setattr(gc, "freeze", lambda: kept.append(gc.isenabled()))
    with pytest.raises(ImportError), importing_without_gc("not_there"):
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and kept == [True]
    with importing_without_gc("sys"):
        assert gc.isenabled(), "nothing is imported"
    assert len(kept) == 1
