"""The command `shardtune`: a folder for each verb, with what the verbs share beside them."""
