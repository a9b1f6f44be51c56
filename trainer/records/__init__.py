"""What a run writes down about itself: metrics, trackers, console, status."""
