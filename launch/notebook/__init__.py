"""What `shardtune` returns to Python, and how a notebook shows it: cards, call-outs, tables and curves, without a script."""
