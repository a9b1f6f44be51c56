"""What people read about a prepared data set: the audit page, the data card, the terminal.

`audit` is the form of `audit.json`; `describe` makes it, `pages` turns it into page and card, in the words of `wording`;
`inspection` serves `shardtune prepare --print`, `preview` the first lines of a run, `progress` says that preparation goes on.
"""
