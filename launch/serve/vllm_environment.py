"""vLLM in a Python environment of its own (`serve.python`): that it is there, and how it imports the gateway.

vLLM 0.32 asks for an older transformers than shardtune, so the two cannot share an environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from strategies.cache_dir import cache_directory
from strategies.errors import ConfigError

REPOSITORY_DIR = Path(__file__).resolve().parents[2]
GATEWAY_PACKAGE_NAMES = ("launch", "strategies")
"""Packages of shardtune that the gateway imports. Of these it imports modules that need Python's own library alone."""
PYTHON_TOO_OLD_EXIT_CODE = 3
NO_VLLM_EXIT_CODE = 4
VLLM_CHECK_SCRIPT = f"""
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit({PYTHON_TOO_OLD_EXIT_CODE})
if importlib.util.find_spec("vllm") is None:
    sys.exit({NO_VLLM_EXIT_CODE})
"""
"""What another Python says of itself by its exit code. It does not import vLLM, which takes many seconds."""
SET_UP_REMEDY = "set serve.python to the Python of an environment that has vLLM (docs/deployment.md)"


def find_vllm_python(python: str) -> str:
    """Find the Python of another environment that `serve.python` names, and make sure that it has vLLM; returns its path.

    It is started to see that. Raises ConfigError if there is no such program, it does not start, it is too old, or it has no
    vLLM.
    """
    setting = f"serve.python={python}"
    executable = shutil.which(str(Path(python).expanduser()))
    if executable is None:
        raise ConfigError(f"{setting}: there is no such program; {SET_UP_REMEDY}")
    try:
        # Without this process's variables, such as PYTHONPATH, which would show it the packages of this environment.
        check = subprocess.run(
            [executable, "-c", VLLM_CHECK_SCRIPT], capture_output=True, check=False, env={"PATH": os.defpath}
        )
    except OSError as error:
        raise ConfigError(f"{setting}: cannot be started ({error}); {SET_UP_REMEDY}") from error
    if check.returncode == PYTHON_TOO_OLD_EXIT_CODE:
        raise ConfigError(f"{setting}: the gateway needs Python 3.11 or later; {SET_UP_REMEDY}")
    if check.returncode:
        raise ConfigError(f"{setting}: is no Python that has vLLM; {SET_UP_REMEDY}")
    return executable


def create_gateway_directory() -> Path:
    """Make the gateway importable for the Python of vLLM's environment, without the libraries of this one; returns a directory.

    The gateway: our middleware in front of vLLM (`launch/serve/middleware.py`). If shardtune is installed, its packages stand
    among all others of this environment. So the directory, in the cache, has links to the two packages alone.
    """
    directory = cache_directory() / "gateway"
    directory.mkdir(parents=True, exist_ok=True)
    for package in GATEWAY_PACKAGE_NAMES:
        link = directory / package
        # The link may be missing, or lead to another clone of shardtune. It is replaced in one step: a server may start now.
        if not link.is_symlink() or link.resolve() != REPOSITORY_DIR / package:
            new_link = directory / f".{package}.{os.getpid()}"
            new_link.symlink_to(REPOSITORY_DIR / package)
            new_link.replace(link)
    return directory
