"""`shardtune prepare`: read, check and tokenise the data of a run into the cache, show what would be learned, and stop.

Takes the same words as `train`; what concerns training alone (budget, batch) may be left out.
"""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError, StorageError."""
    from launch.compose import compose
    from strategies.errors import ConfigError
    from trainer.validate import problems_of

    config = compose(argv, check=False).config
    problems = [p for p in problems_of(config) if p.startswith(("data.", "model.", "objective"))]
    if problems:
        raise ConfigError(problems)
    from trainer.data.audit import preview, summary
    from trainer.model import load_tokenizer
    from trainer.parts import prepare_data

    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    print(summary(data.report))
    print(preview(data.train, tokenizer, width=100))
    print(f"prepared: {data.directory}" + ("  (from the cache)" if data.report.get("cached") else ""))
    return 0
