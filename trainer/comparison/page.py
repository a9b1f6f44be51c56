"""`compare.html`: the tables, plots and notes of a comparison in one file that needs no network (`page.html.j2`)."""

from __future__ import annotations

from importlib.util import find_spec

from trainer.comparison.compare import Comparison

NEEDS = ("altair", "vl_convert")
"""What draws the page, of the extra `report`."""
Table = tuple[str, list[str], list[list[str]]]
"""(title, headings, cells of each row)."""


def missing() -> str | None:
    """What to install for a page; None where all is there."""
    lacking = [package for package in NEEDS if find_spec(package) is None]
    return f"compare.html needs {' and '.join(lacking)}: pip install 'shardtune[report]'" if lacking else None


def page(found: Comparison, tables: list[Table], sections: list[tuple[str, list[str]]]) -> str:
    """The text of the page; what comes from runs is escaped. Takes seconds: the plots' scripts are gathered into it."""
    from jinja2 import Environment, PackageLoader
    from vl_convert import javascript_bundle

    from trainer.comparison.plots import plots

    template = Environment(loader=PackageLoader("trainer.comparison", "."), autoescape=True).get_template(
        "page.html.j2"
    )
    cells = [
        (title, headings, [[(shown, sort_value(shown)) for shown in row] for row in rows])
        for title, headings, rows in tables
    ]
    scripts = javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # its stub forgets the default
    told = [(title, said) for title, said in sections if title != "verdict"]
    return template.render(found=found, tables=cells, sections=told, plots=plots(found), scripts=scripts)


def sort_value(shown: str) -> str:
    """What a cell is sorted by: its first number, without separators and units, else its text; nothing where it has none."""
    if shown == "-":
        return ""
    first = shown.replace(",", "").split("%")[0]
    for candidate in (first, first.split("-")[0]):
        try:
            return repr(float(candidate))
        except ValueError:
            continue
    return shown
