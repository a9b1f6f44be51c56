"""The command `shardtune`: a folder for each verb, with what the verbs share beside them."""

import logging

# transformers imports torchao wherever it is installed, and each process would tell on the screen which of its GPU kernels this
# machine does not load, and what torch will one day not accept of it.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in str(record.msg))
