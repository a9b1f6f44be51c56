"""Reads the sentences under the settings in the code, for the pages and files that show them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from itertools import pairwise


def direct_field_docstrings(settings_class: type) -> dict[str, str]:
    """Read the sentence under each field out of the source of a settings class: {"lr": "The learning rate."}.

    Python keeps no such sentences at run time. Inherited fields are left out.
    """
    (class_node,) = ast.parse(textwrap.dedent(inspect.getsource(settings_class))).body
    assert isinstance(class_node, ast.ClassDef)
    sentence_by_field = {}
    for statements in pairwise(class_node.body):
        match statements:
            case (ast.AnnAssign(target=ast.Name(id=field_name)), ast.Expr(value=ast.Constant(value=sentence))):
                sentence_by_field[field_name] = " ".join(str(sentence).split())
    return sentence_by_field


def field_docstrings(settings_class: type) -> dict[str, str]:
    """The sentence under each field of a settings class, inherited fields included."""
    sentence_by_field: dict[str, str] = {}
    for base in reversed(settings_class.__mro__):
        if is_dataclass(base):
            sentence_by_field |= direct_field_docstrings(base)
    return sentence_by_field
