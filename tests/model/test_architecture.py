"""What is read of an architecture before it is trained."""

from tests.models import tiny
from trainer.model.architecture import width_and_blocks


def test_architecture_width_and_blocks_are_known_also_without_a_setting():
    blt = tiny.tiny_model("blt")  # whose four parts have sizes of their own
    assert not hasattr(blt.config, "hidden_size")
    layers = sum(name.rpartition(".")[0].endswith("layers") for name, _ in blt.named_modules())
    assert width_and_blocks(blt) == (blt.config.global_config.hidden_size, layers)
    llama = tiny.tiny_model("llama")
    assert width_and_blocks(llama) == (llama.config.hidden_size, llama.config.num_hidden_layers)
