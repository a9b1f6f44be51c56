"""What is done about steps that stand out: their loss, or their gradient norm."""
