"""`report.html`, the page of one run: its result, what to do about it, and its costs."""
