"""What people type: one thin verb a file, over the trainer."""
