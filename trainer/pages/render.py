"""Renders a page: one HTML file that needs no network, from the base template and a template of the caller's package.

The caller's template begins `{% extends "base.html.j2" %}`, fills the blocks `title` and `content` (also `head` and
`scripts`) and draws pieces after `{% import "pieces.html.j2" as pieces with context %}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.pages.numbers import format_bytes, format_duration, format_number, format_percent, format_signed

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

NO_VALUES = {"vega_script": "", "reload_after_s": None}
"""Values that the base template reads and a caller may leave out, so that a missing name is no error there: the script that draws
plots (`trainer.pages.vega`) is left out where the page has none or the extra `report` is missing; a browser reloads the page
after these seconds."""


def render(
    package: str,
    template: str,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    finalize: Callable[[Any], Any] | None = None,
    **values: Any,
) -> str:
    """Fill the template of a page, and return its HTML. Every expression is escaped, and a name without a value is an error.

    Arguments:
        package: the Python package that holds the template, which is a file in its folder.
        filters: further filters of the template, beside number, signed, percent, duration and bytes.
        finalize: what each expression goes through before it is escaped, for pages that show text of strangers.

    Errors: jinja2.UndefinedError for a name without a value.
    """
    environment = page_environment(package, finalize, tuple((filters or {}).items()))
    return environment.get_template(template).render(NO_VALUES | values)


@cache
def page_environment(
    package: str,
    finalize: Callable[[Any], Any] | None = None,
    filters: tuple[tuple[str, Callable[..., Any]], ...] = (),
) -> Environment:
    """Set up Jinja for the templates of a package: strict, escaping, with the house's filters for numbers and `filters`.

    `finalize`: what each expression goes through before it is escaped; None: nothing. Cached for each combination of arguments,
    since compiling templates takes longer than filling them.
    """
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    # Shared templates come first: a package's own `base.html.j2` would change its pages alone, and unnoticed.
    loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader(package, ".")])
    environment = Environment(
        loader=loader,
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.filters |= {
        "number": format_number,
        "signed": format_signed,
        "percent": format_percent,
        "duration": format_duration,
        "bytes": format_bytes,
        "script_json": script_json,
    }
    environment.filters |= dict(filters)
    return environment


def script_json(spec: str | Mapping[str, Any]) -> Markup:
    """Make JSON safe to stand in a script element of a page, whatever is in its texts. `spec`: JSON text, or a value.

    `</script>` or `<!--` in the name of a run would end the element or change how it is read.
    """
    from markupsafe import Markup

    text = spec if isinstance(spec, str) else json.dumps(spec, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
