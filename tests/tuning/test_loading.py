"""peft is loaded without torch's compiler, for which bitsandbytes asks at once."""

import sys

import torch

from trainer.tuning.compat.peft import load_peft

ASKS = """
import torch

@torch.compile
def plain(number):
    return number + 1

@torch.compile(dynamic=True)
def told(number):
    "Twice as much."
    return number * 2
"""


def test_peft_functions_for_the_compiler_are_compiled_when_called(tmp_path, monkeypatch):
    compiled = []

    def compiler(function, **settings):
        compiled.append((function.__name__, settings))
        return lambda number: function(number) + 100

    (tmp_path / "peft.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    monkeypatch.setattr(torch, "compile", compiler)
    peft = load_peft()
    del sys.modules["peft"]
    assert not compiled and torch.compile is compiler and peft.told.__doc__ == "Twice as much."
    assert (peft.told(5), peft.plain(5), peft.told(6)) == (110, 106, 112)
    assert compiled == [("told", {"dynamic": True}), ("plain", {})]
