"""What a run writes: metrics, console, trackers, status, run record, model card and other documents."""
