"""Trackers that metrics go to beside `metrics.jsonl`, one module each."""
