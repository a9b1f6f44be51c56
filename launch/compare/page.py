"""Writes the plots of a comparison, or of one run, as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from launch.compare.comparison import Comparison
from launch.compare.cost_plots import comparison_plots
from launch.compare.run_page.figures import Figure, run_figures
from launch.compare.vega_specs import PagePlot
from strategies.extras import install_command
from trainer.reporting.status import write_atomic

REQUIRED_PACKAGES = ("altair", "vl_convert")
"""Packages of the extra `report` that draw the plots."""
IMAGE_CONFIG = {
    "range": {"category": ["#0072b2", "#d55e00", "#009e73", "#3b1f6b", "#aa3377", "#7f8fa9", "#661100", "#00473b"]},
    "mark": {"color": "#0072b2"},
    "style": {"ink": {"stroke": "#1b2430", "color": "#1b2430"}, "bad": {"stroke": "#b3261e", "color": "#b3261e"}},
    "legend": {"orient": "top"},
}
"""How plots look as pictures: the colours of the light page, which colour-blind readers can tell apart."""


def missing_packages_message(page_name: str = "compare.html") -> str | None:
    """Say how to install the packages that the plots need; None if all are there. `page_name`: the page that lacks its plots."""
    missing = [package for package in REQUIRED_PACKAGES if find_spec(package) is None]
    if not missing:
        return None
    return f"{page_name} needs {' and '.join(missing)}: {install_command('report')}"


class PlotImage(NamedTuple):
    """A picture of a plot beside the page."""

    title: str
    relative_path: str
    """From the directory of the page: `plots/loss.png`."""


def write_plot_images(comparison: Comparison, output_dir: Path) -> list[PlotImage]:
    """Draw each plot of the comparison as `plots/<name>.png` in `output_dir`, for the Markdown page; returns the pictures.

    Drawing takes seconds. Raises StorageError if a picture cannot be written.
    """
    from vl_convert import vegalite_to_png

    written = []
    for plot in _plots_of_page(comparison):
        image = PlotImage(plot.title, relative_path=f"plots/{plot.name}.png")
        # `scale`: pixels of the picture for each pixel of the plot.
        png = vegalite_to_png(json.dumps(plot.spec), scale=2, config=IMAGE_CONFIG)
        write_atomic(output_dir / image.relative_path, png)
        written.append(image)
    return written


def _plots_of_page(comparison: Comparison) -> Sequence[PagePlot | Figure]:
    """The plots that the HTML page of the comparison shows: those of several points, or those of its only run."""
    if len(comparison.points) > 1:
        return comparison_plots(comparison)
    point = comparison.points[0]
    main_plots, folded_plots = run_figures(point.first_repeat, point.summary.parts_s, profile=None)
    return [*main_plots, *folded_plots]
