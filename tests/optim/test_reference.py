"""Each optimizer against what it claims to be: the paper's algorithm, or torch's or the authors' own code."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from strategies.errors import ConfigError
from trainer.optim.build import build_optimizer
from trainer.optim.config import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    LionConfig,
    MuonConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from trainer.optim.whole import orthogonalise

SHAPES = {
    "layers.0.up.weight": (24, 16),
    "layers.0.up.bias": (24,),
    "layers.1.down.weight": (8, 40),
    "embed.weight": (9, 16),
}
STEPS = 12


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(n, nn.Parameter(torch.randn(s, generator=generator))) for n, s in SHAPES.items()]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


def run(optimizer, named, steps=STEPS):
    """The parameters after each step, as float64 arrays."""
    found = []
    for step in range(steps):
        for (_, p), grad in zip(named, gradients(step), strict=True):
            p.grad = grad.clone()
        optimizer.step()
        found.append([p.detach().double().numpy().copy() for _, p in named])
    return found


def run_ours(config):
    named = parameters()
    return run(build_optimizer(config, named), named)


def assert_equal(ours, theirs):
    for step, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for name, a, b in zip(SHAPES, left, right, strict=True):
            assert np.array_equal(a, b), (step, name)
    assert not np.array_equal(ours[0][0], ours[-1][0])


def test_lion_is_algorithm_2_of_the_paper():
    beta1, beta2, lr, decay = 0.9, 0.98, 1e-2, 0.1
    ours = run_ours(LionConfig(lr=lr, betas=[beta1, beta2], weight_decay=decay))
    named = parameters()
    theta = [p.detach().double().numpy().copy() for _, p in named]
    momentum = [np.zeros_like(t) for t in theta]
    for step in range(STEPS):
        for i, grad in enumerate(gradients(step)):
            g = grad.double().numpy()
            update = np.sign(beta1 * momentum[i] + (1 - beta1) * g)
            theta[i] = theta[i] - lr * (update + (decay if theta[i].ndim == 2 else 0.0) * theta[i])
            momentum[i] = beta2 * momentum[i] + (1 - beta2) * g
            np.testing.assert_allclose(ours[step][i], theta[i], rtol=0, atol=2e-6)  # float32 against float64


def test_muon_in_bf16_is_torchs_on_the_matrices_of_blocks_and_adamw_elsewhere():
    config = MuonConfig(lr=1e-2, weight_decay=0.1, bf16=True)
    ours = run_ours(config)
    named = parameters()
    inner = [p for n, p in named if "layers" in n and p.dim() == 2]
    muon = torch.optim.Muon(inner, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    vectors, embeddings = [named[1][1]], [named[3][1]]
    adamw = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": embeddings, "weight_decay": 0.1}], lr=1e-2, fused=True
    )

    class Both:
        def step(self):
            muon.step()
            adamw.step()

    assert_equal(ours, run(Both(), named))


def test_muon_in_fp32_differs_from_bf16_by_its_rounding_only():
    exact, rounded = run_ours(MuonConfig(lr=1e-2)), run_ours(MuonConfig(lr=1e-2, bf16=True))
    moved = np.abs(exact[-1][0] - parameters()[0][1].detach().numpy()).max()
    assert 0 < np.abs(exact[-1][0] - rounded[-1][0]).max() < 0.02 * moved


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (1, 8), (5, 5)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    turned = orthogonalise(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.3 and values.max() < 1.3
    # It turns nothing but the lengths of the axes: the product with the matrix stays symmetric and positive.
    product = turned @ matrix.T
    assert torch.allclose(product, product.T, atol=1e-3 * product.abs().max().item())


def test_adafactor_is_torchs():
    ours = run_ours(AdafactorConfig(lr=0.03, weight_decay=0.1))
    named = parameters()
    groups = [
        {"params": [p for _, p in named if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    assert_equal(ours, run(torch.optim.Adafactor(groups, lr=0.03, foreach=False), named))


def test_sgd_is_torchs():
    ours = run_ours(SgdConfig(lr=0.03, momentum=0.8, nesterov=True))
    named = parameters()
    theirs = run(torch.optim.SGD([p for _, p in named], lr=0.03, momentum=0.8, nesterov=True), named)
    assert_equal(ours, theirs)


def test_schedule_free_is_the_authors():
    schedulefree = pytest.importorskip("schedulefree", reason="needs shardtune[schedule_free]")
    ours = run_ours(ScheduleFreeConfig(lr=1e-2))
    named = parameters()
    theirs = schedulefree.AdamWScheduleFree([p for _, p in named], lr=1e-2, betas=(0.9, 0.999))
    theirs.train()
    assert_equal(ours, run(theirs, named))


def test_8_bit_adamw_follows_adamw():
    pytest.importorskip("bitsandbytes", reason="needs shardtune[qlora]")
    ours, exact = run_ours(Adamw8bitConfig(lr=1e-2, min_8bit_elements=64)), run_ours(AdamwConfig(lr=1e-2))
    moved = np.abs(exact[-1][0] - parameters()[0][1].detach().numpy()).mean()
    assert 0 < np.abs(ours[-1][0] - exact[-1][0]).mean() < 0.1 * moved


@pytest.mark.parametrize(
    ("config", "package", "extra"),
    [
        (ScheduleFreeConfig(lr=1e-3), "schedulefree", "schedule_free"),
        (Adamw8bitConfig(lr=1e-3), "bitsandbytes", "qlora"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(config, package, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package} .*\[{extra}\].*optim=adamw"):
        build_optimizer(config, parameters())


def test_rates_of_groups_reach_every_optimizer():
    for config in (AdamwConfig, LionConfig, MuonConfig, AdafactorConfig, SgdConfig):
        optimizer = build_optimizer(config(lr=1.0, layer_decay=0.5), parameters())
        rates = {round(math.log2(group["lr"])) for group in optimizer.param_groups}
        assert rates == {-2, -1, 0}, config  # blocks 0 and 1; `embed` alone is no name of an embedding known here
