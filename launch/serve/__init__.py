"""`shardtune serve` and `chat`: an export behind an OpenAI-compatible address, or in the terminal."""
