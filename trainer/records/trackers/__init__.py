"""Where rows go beside `metrics.jsonl`: one module a tracker, each behind `base.Tracker`, named in `registry`."""
