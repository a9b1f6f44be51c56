"""`report.html`, the page of one run: what came of it, what to do about it, and what it took."""
