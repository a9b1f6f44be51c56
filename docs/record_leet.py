"""Takes docs/pictures/leet.svg: W&B's program `wandb leet`, which draws a run's files in a terminal.

    python docs/record_leet.py runs/demo

The run must have W&B's files, as a run with `logging.wandb=offline` has. Needs tmux, and `wandb` on the PATH. No server is asked.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).resolve().parent / "pictures" / "leet.svg"
COLUMNS, ROWS = 118, 32
SERVER = "shardtune-leet"
"""Name of a tmux server of its own."""
METRICS = "n/loss|l/loss|norm|_rate"
"""Filter of the metrics that are drawn, a regular expression."""
STARTUP_S = 15
"""Seconds that the program may take to read the files."""
KEY_S = 12
"""Seconds for each key: the program draws slowly on a busy machine."""


def tmux(*words: str) -> str:
    """What a tmux command of our server prints. CalledProcessError if it fails."""
    done = subprocess.run(["tmux", "-L", SERVER, *words], check=True, capture_output=True, text=True)
    return done.stdout


def capture(run_files: Path, config_dir: str) -> str:
    """The screen of `wandb leet` with the chosen metrics, colours included."""
    # It keeps which panels are open; a directory of its own has the defaults.
    program = f"env WANDB_CONFIG_DIR={config_dir} wandb leet run {run_files}"
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), "-s", "leet", program)
    try:
        time.sleep(STARTUP_S)
        # `]` closes the metrics of the machine, `/` filters those of the run.
        for keys in (["]"], ["/"], ["-l", METRICS], ["Enter"]):
            tmux("send-keys", "-t", "leet", *keys)
            time.sleep(KEY_S)
        return tmux("capture-pane", "-e", "-p", "-t", "leet")
    finally:
        tmux("kill-server")


def drawn(screen: str) -> str:
    """The screen as SVG, which loads no font from elsewhere."""
    # A reader's home is another: `~` stands for it, as many columns wide as before.
    home = re.escape(str(Path.home()))
    screen = re.sub(home + r"([\w./-]*)", lambda match: f"~{match[1]}".ljust(len(match[0])), screen)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen))
    svg = console.export_svg(title="wandb leet", unique_id="leet")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main(words: list[str]) -> None:
    """See the top of the file."""
    run_files = sorted(Path(words[0]).glob("wandb/offline-run-*"))
    if not run_files:
        raise SystemExit(f"{words[0]}: has no files of W&B; train with logging.wandb=offline")
    with tempfile.TemporaryDirectory() as config_dir:
        screen = capture(run_files[0].resolve(), config_dir)
    PICTURE.write_text(drawn(screen), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
