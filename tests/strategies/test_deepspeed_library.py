"""DeepSpeed is imported without what only its autotuner would use."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import importlib.util, json, sys
from strategies.deepspeed_library import import_deepspeed
import_deepspeed(on_cpu=True)
print(json.dumps(["mlflow" in sys.modules, importlib.util.find_spec("mlflow") is not None]))
"""


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_deepspeed_import_leaves_out_trackers_that_can_be_imported_afterwards():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True]
