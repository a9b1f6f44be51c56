"""Where rows come from: files of every supported kind, and hub data sets."""
