"""Messages of libraries that look like faults of a run, and are none: they are not shown.

A message is known by its logger and its words. Every other message of the same library is still shown. Each process of a run
hides them before it imports those libraries, so this module imports nothing heavy.
"""

import logging

HARMLESS = {
    # torchao tries to load all its GPU kernels when transformers imports it, and lists those that are not for this machine.
    "torchao": ("Failed to load ", "_C"),
    # torchao registers its settings in a way that torch no longer needs.
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    # bitsandbytes looks for a faster kernel on processors with bfloat16 products. Without it, it uses its own kernel, as before.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    # transformers would rather have the factor written than compute it from two lengths, as config.json of Phi has them.
    "transformers.modeling_rope_utils": (
        "This model config has set a `rope_parameters['original_max_position_embeddings']` field",
        "Please set the `factor` field of `rope_parameters`",
    ),
}
"""Words that all occur in a harmless message, by the name of its logger."""


def hide_harmless_messages() -> None:
    """Keep the messages of `HARMLESS` from every handler. Calling it again changes nothing."""
    for logger in HARMLESS:
        logging.getLogger(logger).addFilter(is_worth_showing)


def is_worth_showing(record: logging.LogRecord) -> bool:
    """Whether the message of a logger in `HARMLESS` is another one than its harmless one."""
    message = record.getMessage()
    return not all(words in message for words in HARMLESS[record.name])
