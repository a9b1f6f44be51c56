"""The peers' own environments under `benchmarks/.envs`, made once each. Shared by all benchmarks.

A peer's packages are pinned to what the results were measured with; another version is a change of this table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("SHARDTUNE_BENCH_WORK") or HERE / ".work").resolve()
"""Where everything but the environments and the results is written."""
PACKAGES = {
    "trl": ["trl==1.16.0", "transformers==5.24.0", "peft==0.21.2"],
    "litgpt": ["litgpt==0.5.13", "requests"],  # it imports requests without declaring it
    "torchtune": ["torchtune==0.6.1", "torchao==0.15.0"],  # later torchao has moved what it imports
    "llamafactory": ["llamafactory==0.9.5"],
    "axolotl": ["axolotl==0.19.0"],
    "datasets": ["datasets", "transformers", "jinja2"],
}


def envs() -> Path:
    """Where the environments are: `SHARDTUNE_BENCH_ENVS`, to share them between clones, or `.envs` beside this file."""
    return Path(os.environ.get("SHARDTUNE_BENCH_ENVS") or HERE / ".envs").resolve()


def python_of(peer: str | None) -> str:
    """The interpreter of a peer's environment; this one for None."""
    return sys.executable if peer is None else str(envs() / peer / "bin" / "python")


def install(peer: str) -> str | None:
    """Make a peer's environment unless it is there with these packages; what went wrong, if anything did."""
    directory, wanted = envs() / peer, "\n".join(PACKAGES[peer]) + "\n"
    stamp = directory / "installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    shutil.rmtree(directory, ignore_errors=True)
    print(f"installing {peer} ...", flush=True)
    try:
        for command in (
            [sys.executable, "-m", "venv", str(directory)],
            [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES[peer]],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr if isinstance(error.stderr, str) and error.stderr.strip() else str(error)
        return f"cannot be installed: {said.strip().splitlines()[-1]}"
    stamp.write_text(wanted, encoding="utf-8")
    return None


def hardware() -> str:
    """The processor, the cores this process may use, and the memory."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in about if line.startswith("model name")), "unknown processor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
