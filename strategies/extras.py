"""The command that installs an optional part of this package, as messages name it."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """The command for an extra of setup.py, typed in the checkout: the package is on no index.

    `extra` may also be several names with commas between them.
    """
    return f"pip install -e '.[{extra}]'"
