"""Packages with GPU kernels that transformers uses, if installed, for the layers of hybrids and state-space models."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from strategies.extras import install_command

ASKS = re.compile(r'use_kernel_func_from_hub_with_fallback\(\s*"\w+",\s*"(\w+)"')
"""How a modelling file of transformers names the package of a function that it has a slower version of."""
EXTRAS = {"fla": "hybrid", "causal_conv1d": "hybrid", "mamba_ssm": "mamba"}
"""The extra of this project that installs a package."""


ATTENTION = ("flash_attn", "triton")
"""Packages that compute attention."""


def kernel_versions() -> dict[str, str]:
    """Of the packages with kernels that are installed, whatever model would take them."""
    found = {}
    for name in (*EXTRAS, *ATTENTION):
        with suppress(PackageNotFoundError):
            found[name] = version(_distribution(name))
    return found


def packages(model: nn.Module) -> list[str]:
    """Import names of the packages whose kernels transformers would take for layers of `model`."""
    files = {type(module).__module__ for module in model.modules()}
    found: set[str] = set()
    for name in sorted(n for n in files if n.startswith("transformers.models.")):
        found.update(ASKS.findall(inspect.getsource(sys.modules[name])))
    return sorted(found)


def missing_kernels(model: nn.Module) -> str:
    """What to say where kernels are missing that would make `model` faster on a GPU; empty where none are."""
    lacking = [name for name in packages(model) if importlib.util.find_spec(name) is None]
    if not lacking:
        return ""
    extras = ",".join(dict.fromkeys(EXTRAS[name] for name in lacking if name in EXTRAS))
    remedy = install_command(extras) if extras else "install them"
    return (
        f"loops in torch, right but slow, for what {' and '.join(map(_distribution, lacking))} would compute ({remedy})"
    )


def _distribution(package: str) -> str:
    """What a package is called where it is installed from."""
    return "flash-linear-attention" if package == "fla" else package.replace("_", "-")
