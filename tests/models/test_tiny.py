"""The tiny models keep what their architectures tell apart: otherwise the sweep would prove less than it says."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.helpers.covering import chosen
from tests.models import stock, sweep, tiny
from tests.models.own import MINIMAL

MOST = 500_000
"""Parameters of one."""
TYPES, TABLE = tiny.causal_types(), sweep.read()["types"]


def told(config) -> dict[str, set]:
    """Each kind of layer that a configuration lists."""
    settings = config.to_dict()
    return {name: set(map(str, settings.get(name) or ())) for name in tiny.KINDS}


def kinds(model_type) -> set:
    """All of them, as the table has them: to make each configuration takes seconds wherever tests are collected."""
    return set(TABLE.get(model_type, {}).get("kinds", ()))


SOME = chosen(TYPES, kinds)


@pytest.mark.parametrize("model_type", SOME)
def test_no_kind_of_layer_is_lost(model_type):
    whole = CONFIG_MAPPING[model_type](**MINIMAL.get(model_type, {})).get_text_config()
    small = tiny.tiny_config(model_type).get_text_config()
    for name, listed in told(whole).items():
        assert listed <= told(small)[name], name


@pytest.mark.parametrize("model_type", SOME)
def test_documents_are_longer_than_windows(model_type):
    settings = tiny.tiny_config(model_type).get_text_config().to_dict()
    shortest = min(len(sample.input_ids) for sample in stock.documents())
    for name in (
        "sliding_window",
        "attention_chunk_size",
        "attention_window_size",
        "sliding_window_size",
        "index_topk",
    ):
        assert (settings.get(name) or 0) < shortest, name


@pytest.mark.parametrize("model_type", SOME)
def test_every_parameter_is_random_and_few(model_type):
    model = tiny.tiny_model(model_type)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) < MOST
    still = [name for name, p in parameters.items() if p.numel() > 1 and bool((p == p.flatten()[0]).all())]
    assert not still
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
