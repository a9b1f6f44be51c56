"""What people read about a prepared data set: the audit page, the data card, the terminal.

`schema` is the contract of `audit.json`; `html.page` and `card.datacard` turn it into text; `inspect` and `located` serve
`shardtune data inspect`.
"""
