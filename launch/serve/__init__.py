"""`shardtune serve` and `chat`: an exported model behind an OpenAI-compatible address, or in the terminal."""
