"""The command `shardtune`: a folder for each verb, with what the verbs share beside them."""

from strategies.compat.library_messages import hide_harmless_messages

# Each process of a run imports this package first, before the libraries whose messages are meant.
hide_harmless_messages()
