"""How often the detectors find what is there and call what is not, in real runs of a model that a laptop trains in seconds.

    python -m benchmarks.challenges [directory] [overfitting|forgetting|none|remedies|people|canaries|divergence|guards ...]

A Llama of 0.1 million parameters knows a made-up language: each word has four that may follow it. It is tuned at five
strengths of overfitting (fewer and fewer documents), of forgetting (another language, at higher and higher rates), of a group
of people that the data wrongs (a larger and larger share of its labels turned), and of secrets in the data (more and more
copies), five seeds each; in 20 runs in which there is nothing to find, for each; and with each remedy. Every number is what
`shardtune train` and `shardtune evaluate` themselves wrote. Prints tables and writes `results/challenges.json`; a directory
that was named is gone on with.
"""
