"""Where metrics go beside `metrics.jsonl`: one module a tracker."""
