"""What people read about a prepared data set: the audit page, the data card, the terminal.

`audit` is the form of `audit.json`; `describe` makes it, `page` and `card` turn it into text by their templates; `located`
and `inspection` serve `shardtune data inspect`, `preview` the first lines of a run.
"""
