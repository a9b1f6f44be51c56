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
    sentences = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(following, ast.Expr):
            assert isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            sentences[statement.target.id] = " ".join(str(following.value.value).split())
    return sentences


def all_docstrings(settings: type) -> dict[str, str]:
    """The sentence under each field of a settings class, inherited fields included."""
    sentences: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if is_dataclass(base):
            sentences |= docstrings(base)
    return sentences
