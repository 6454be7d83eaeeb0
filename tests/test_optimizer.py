"""Muon against singular value decompositions, AdamW against its formulas."""

import copy
from types import SimpleNamespace

from fused_ddpm.optimizer import Muon, make_optimizer, orthogonalized

import pytest
import torch
import torch.nn as nn


def matrices(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def test_singular_vectors_stay_and_values_become_one():
    """Of wide, tall and square ones, also of equal sides in one call, whatever their scale."""
    made = matrices([(16, 144), (144, 16), (16, 60), (5, 5), (1, 9)])
    made += [1e-6 * made[0], 1e6 * made[1]]
    for x, found in zip(made, orthogonalized(made), strict=True):
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        core = u.T @ found.double() @ v.T  # diagonal, if the vectors are the same
        large = s > 0.1 * s.norm() / len(s) ** 0.5
        values = core.diagonal()[large]
        assert values.min() > 0.65 and values.max() < 1.25
        assert (core - torch.diag(core.diagonal())).abs().max() < 1e-3
    torch.testing.assert_close(orthogonalized(made)[5], orthogonalized(made)[0], rtol=0, atol=1e-4)


def test_what_is_not_there_stays_so():
    thin = matrices([(12, 2)])[0] @ matrices([(2, 40)], 1)[0]  # of rank 2
    values = torch.linalg.svdvals(orthogonalized([thin])[0])
    assert values[1] > 0.65 and values[2] < 1e-3
    assert (orthogonalized([torch.zeros(3, 4)])[0] == 0).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3)
        self.out, self.line = nn.Conv2d(6, 8, 1), nn.Linear(3, 4)

    def forward(self, x):
        return self.out(self.inner(self.stem(x))).square().mean() + self.line(x[..., :3]).sum()


def config(**changes):
    return SimpleNamespace(**{"optimizer": "muon", "lr": 0.01, "weight_decay": 0.0} | changes)


def train(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        net(matrices([(4, 2, 8, 8)], step)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_inner_kernels_take_orthogonal_steps(decay):
    """All else, biases included, those of AdamW; Adam is AdamW without decay."""
    net, plain = Net(), Net()
    made = make_optimizer(net, config(weight_decay=decay))
    adam = make_optimizer(plain, config(optimizer="adam", weight_decay=decay))
    assert type(adam) is torch.optim.AdamW and isinstance(made, Muon)
    before = copy.deepcopy(net.state_dict())
    train(net, made, 1)
    train(plain, adam, 1)
    for name, x in net.state_dict().items():
        y = plain.state_dict()[name]
        if name != "inner.weight":
            torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    step = (1 - 0.01 * decay) * before["inner.weight"] - net.inner.weight
    values = torch.linalg.svdvals(step.detach().flatten(1)) / (0.01 * 0.2 * 54**0.5)
    assert 0.6 < values.min() and values.max() < 1.25
    adams = before["inner.weight"] - plain.inner.weight
    assert 0.1 < step.square().mean().sqrt() / adams.square().mean().sqrt() < 1  # of one size


def test_momentum_is_nesterovs():
    net = Net()
    made = make_optimizer(net, config())
    kept, sums = net.inner.weight, torch.zeros(6, 54)
    for step in range(3):
        net(matrices([(4, 2, 8, 8)], step)[0]).backward()
        gradient, before = kept.grad.flatten(1).clone(), kept.detach().clone()
        sums = 0.95 * sums + 0.05 * gradient
        expected = 0.01 * 0.2 * 54**0.5 * orthogonalized([0.05 * gradient + 0.95 * sums])[0]
        made.step()
        made.zero_grad()
        torch.testing.assert_close(before.flatten(1) - kept.flatten(1), expected, rtol=0, atol=1e-5)


def test_it_goes_on_from_its_state_bit_for_bit():
    one, other = Net(), Net()
    optimizer = make_optimizer(one, config())
    train(one, optimizer, 3)
    other.load_state_dict(one.state_dict())
    again = make_optimizer(other, config())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(one, optimizer, 2, first=3)
    train(other, again, 2, first=3)
    assert all(torch.equal(x, other.state_dict()[k]) for k, x in one.state_dict().items())
