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

KERNEL_REQUEST = re.compile(r'use_kernel_func_from_hub_with_fallback\(\s*"\w+",\s*"(\w+)"')
"""How a modelling file of transformers names the package of a function that it has a slower version of."""
EXTRA_BY_PACKAGE = {"fla": "hybrid", "causal_conv1d": "hybrid", "mamba_ssm": "mamba"}
"""The extra of this project that installs a package."""


ATTENTION_PACKAGES = ("flash_attn", "triton")
"""Packages that compute attention."""


def kernel_versions() -> dict[str, str]:
    """Versions of the installed packages with kernels, whatever model would use them."""
    versions = {}
    for name in (*EXTRA_BY_PACKAGE, *ATTENTION_PACKAGES):
        with suppress(PackageNotFoundError):
            versions[name] = version(_distribution(name))
    return versions


def kernel_packages(model: nn.Module) -> list[str]:
    """Import names of the packages whose kernels transformers would take for layers of `model`."""
    files = {type(module).__module__ for module in model.modules()}
    names: set[str] = set()
    for name in sorted(n for n in files if n.startswith("transformers.models.")):
        names.update(KERNEL_REQUEST.findall(inspect.getsource(sys.modules[name])))
    return sorted(names)


def missing_kernels(model: nn.Module) -> str:
    """What to tell the user if kernel packages are missing that would make `model` faster on a GPU; "" if none are."""
    missing = [name for name in kernel_packages(model) if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    extras = dict.fromkeys(EXTRA_BY_PACKAGE[name] for name in missing if name in EXTRA_BY_PACKAGE)
    remedy = install_command(",".join(extras)) if extras else "install them"
    distributions = " and ".join(map(_distribution, missing))
    return f"loops in torch, right but slow, for what {distributions} would compute ({remedy})"


def _distribution(package: str) -> str:
    """What a package is called where it is installed from."""
    return "flash-linear-attention" if package == "fla" else package.replace("_", "-")
