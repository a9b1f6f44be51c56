"""The script that draws plots in a browser, which pages embed."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from markupsafe import Markup

from strategies import atomic_io, shared_files
from strategies.cache_dir import cache_directory

REQUIRED_PACKAGES = ("altair", "vl_convert")
"""Packages of the extra `report`."""


def missing_packages() -> list[str]:
    """Packages that plots need and that are not installed."""
    return [package for package in REQUIRED_PACKAGES if find_spec(package) is None]


def vega_script() -> Markup:
    """The JavaScript of Vega (0.9 MB) as one text; empty if the extra `report` is not installed."""
    return Markup("") if missing_packages() else _bundled_script()


@cache
def _bundled_script() -> Markup:
    """The script that pages embed to draw plots without a network: Vega, Vega-Lite and Vega-Embed as one text.

    Bundling takes seconds, so the text is kept in the cache directory, by the version of the package that bundles.
    """
    cached = cache_directory() / "pages" / f"vega-{version('vl-convert-python')}.js"
    try:
        return Markup(cached.read_text(encoding="utf-8"))
    except OSError:
        from vl_convert import javascript_bundle

        # `</script` in the code would end the page's script element.
        script = javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # its stub forgets the default
    with suppress(OSError):  # without a writable cache directory, the next page bundles it anew
        atomic_io.make_directories(cached.parent)
        shared_files.replace_shared_file(cached, script.encode(), f"{os.getpid()}")
    return Markup(script)
