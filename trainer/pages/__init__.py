"""What all pages share: base template, styles, script, and pieces (cards, call-outs, tables, plots)."""
