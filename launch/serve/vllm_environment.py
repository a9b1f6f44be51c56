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

ROOT = Path(__file__).resolve().parents[2]
GATEWAY_PACKAGES = ("launch", "strategies")
"""Packages of shardtune that the gateway imports. Of these it imports modules that need Python's own library alone."""
TOO_OLD, NO_VLLM = 3, 4
CHECK = f"""
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit({TOO_OLD})
if importlib.util.find_spec("vllm") is None:
    sys.exit({NO_VLLM})
"""
"""What another Python says of itself by its exit code. It does not import vLLM, which takes many seconds."""
HOW_TO_SET_UP = "set serve.python to the Python of an environment that has vLLM (docs/deployment.md)"


def find_vllm_python(python: str) -> str:
    """The path of a Python that has vLLM, from the setting `serve.python`. Starts it to see that.

    Raises ConfigError if there is no such program, it does not start, it is too old, or it has no vLLM.
    """
    setting = f"serve.python={python}"
    executable = shutil.which(str(Path(python).expanduser()))
    if executable is None:
        raise ConfigError(f"{setting}: there is no such program; {HOW_TO_SET_UP}")
    try:
        # Without this process's variables, such as PYTHONPATH, which would show it the packages of this environment.
        check = subprocess.run([executable, "-c", CHECK], capture_output=True, check=False, env={"PATH": os.defpath})
    except OSError as error:
        raise ConfigError(f"{setting}: cannot be started ({error}); {HOW_TO_SET_UP}") from error
    if check.returncode == TOO_OLD:
        raise ConfigError(f"{setting}: the gateway needs Python 3.11 or later; {HOW_TO_SET_UP}")
    if check.returncode:
        raise ConfigError(f"{setting}: is no Python that has vLLM; {HOW_TO_SET_UP}")
    return executable


def gateway_directory() -> Path:
    """A directory from which another Python can import the gateway, and none of the libraries beside shardtune.

    If shardtune is installed, its packages stand among all others of this environment. So the directory, in the cache, has links
    to the two packages alone.
    """
    directory = cache_directory() / "gateway"
    directory.mkdir(parents=True, exist_ok=True)
    for package in GATEWAY_PACKAGES:
        link = directory / package
        # Another clone may have made it. A link is replaced whole, since a server may start at this moment.
        if not link.is_symlink() or link.resolve() != ROOT / package:
            new_link = directory / f".{package}.{os.getpid()}"
            new_link.symlink_to(ROOT / package)
            new_link.replace(link)
    return directory
