"""What an evaluation leaves: metrics with intervals, what they are against another one, a page."""
