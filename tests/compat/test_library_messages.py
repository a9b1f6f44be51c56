"""Which messages of libraries are hidden: those that are met, and no others."""

import inspect
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from strategies.compat.library_messages import HARMLESS, hide_harmless_messages

SEEN = {
    "torchao": "Failed to load /env/torchao/_C_cutlass_90a.abi3.so: Could not load this library",
    "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'",
    "transformers.modeling_rope_utils": "This model config has set a `rope_parameters['original_max_position_embeddings']` "
    "field, to be used together with `max_position_embeddings` to determine a scaling factor. Please set the `factor` field of "
    "`rope_parameters`with this ratio instead",
}
"""Messages as runs showed them, by logger."""


@pytest.mark.parametrize("logger", HARMLESS)
def test_harmless_message_is_hidden_and_other_messages_of_its_logger_are_shown(logger, caplog):
    caplog.set_level(logging.WARNING, logger)  # an earlier test may have made transformers quieter
    hide_harmless_messages()
    hide_harmless_messages()
    logging.getLogger(logger).warning(SEEN[logger])
    logging.getLogger(logger).warning("%s is broken", "the kernel")
    assert [record.getMessage() for record in caplog.records] == ["the kernel is broken"]


def test_libraries_still_have_these_messages():
    """A library that words its message anew would be heard again; this names the message to change."""
    from torch.utils import _pytree as tree

    assert "is an Enum subclass and is now natively supported" in inspect.getsource(tree)
    for package, file, words in (
        ("torchao", "__init__.py", "Failed to load {file}"),
        (
            "transformers",
            "modeling_rope_utils.py",
            "This model config has set a `rope_parameters['original_max_position_embeddings']`",
        ),
        ("transformers", "modeling_rope_utils.py", "Please set the `factor` field of `rope_parameters`"),
        ("bitsandbytes", "backends/cpu/ops.py", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    ):
        if (spec := find_spec(package)) is not None:
            source = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
            assert words in source, package
