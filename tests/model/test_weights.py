"""Reading a checkpoint's weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies import runtime as processes
from strategies.parameters import meta_context
from tests.helpers.building import data_set, model_dir, run_config, trainer_for
from trainer.model.weights import BaseWeights, PretrainedWeights, WeightSource
from trainer.tuning.full import Full


def mapped(directory: Path) -> bool:
    """Whether this process has a file of the directory in its memory."""
    return str(directory) in Path("/proc/self/maps").read_text()


def test_the_files_are_unmapped_once_the_model_is_filled(tmp_path):
    path = model_dir(tmp_path)
    runtime = processes.join_job("cpu", timeout_s=60, threads=1)
    try:
        config = run_config(path, "single", "full", micro=4, steps=1)
        trainer = trainer_for(config, data_set(tmp_path, uneven=True), runtime)
        assert trainer.engine.step_module is not None and not mapped(path)
    finally:
        processes.leave_job()


def test_a_row_that_is_zero_is_zero_beside_new_tokens_too(tmp_path):
    path = model_dir(tmp_path)
    with meta_context():
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    name, stored = "model.embed_tokens.weight", PretrainedWeights(path, plain).full_tensor("model.embed_tokens.weight")
    rows, columns = stored.shape
    wanted = torch.cat([stored, stored.mean(0, keepdim=True)])
    wanted[3] = 0
    source = WeightSource(
        BaseWeights(path, plain),
        Full(),
        seed=0,
        init_std=0.0,
        new_token_ids=[rows],
        vocabulary_parameter_names=frozenset({name}),
    )
    source.zero_row_by_name = {name: 3}
    for cut in (0, 2 * columns, 3 * columns + 1, rows * columns):  # as ranks hold it
        parts = [
            source.read_slice(name, wanted.shape, 0, cut),
            source.read_slice(name, wanted.shape, cut, wanted.numel()),
        ]
        assert torch.allclose(torch.cat(parts), wanted.view(-1))


def test_a_closed_checkpoint_is_read_again(tmp_path):
    path = model_dir(tmp_path)
    with meta_context():
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    checkpoint = PretrainedWeights(path, plain)
    name = "model.layers.0.mlp.up_proj.weight"
    first = checkpoint.full_tensor(name).clone()
    assert mapped(path)
    checkpoint.close()
    assert not mapped(path)
    assert checkpoint.full_tensor(name).equal(first)
