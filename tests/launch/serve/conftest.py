"""Exports that real runs wrote: an adapter, and a whole model."""

import pytest

from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data


@pytest.fixture(scope="session", name="site")
def _site(tmp_path_factory):
    """A directory with `model`, and the runs `lora` and `full`."""
    root = tmp_path_factory.mktemp("serving")
    model = tiny_model_dir(root / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    data = write_chat_data(root / "train.jsonl", 16)
    words = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={root / 'cache'}", "optim.lr=1e-2"]
    words += ["batch.global=4", "batch.micro=4", "budget.steps=4", "logging.wandb=disabled", "run.device=cpu"]
    for tuning in ("lora", "full"):
        assert command_here(["train", *words, f"tuning={tuning}", f"run.dir={root / tuning}"]) == 0
    return root
