"""Reports of an evaluation: metrics with intervals, comparison with another evaluation, a page."""
