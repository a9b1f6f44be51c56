"""Reads the sentences under the settings in the code, for the pages and files that show them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass


def docstrings(settings: type) -> dict[str, str]:
    """The sentence under each field of a settings class, its own fields only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[line.target.id] = " ".join(str(after.value.value).split())
    return found


def all_docstrings(settings: type) -> dict[str, str]:
    """The same, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if is_dataclass(base):
            found |= docstrings(base)
    return found
