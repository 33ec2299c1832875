"""Linears are replaced by packed ones of the same numbers; those that read the same rows become one product."""

from __future__ import annotations

import weakref
from typing import cast

import pytest
import torch
from torch import nn

from gateway.packed_linear import LayerProduct, PackedLinear, number_products, pack_linears


class Attention(nn.Module):
    """Query, key and value read the same rows, the output reads what came of them."""

    def __init__(self, biases: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, out, bias=bias) for out, bias in zip((12, 4, 8), biases, strict=True))
        self.o = nn.Linear(24, 16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.o(torch.cat([self.q(rows), self.k(rows), self.v(rows)], -1)))


class Network(nn.Module):
    """A small dense network with every way of calling a linear."""

    def __init__(self, biases: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.attention = Attention(biases)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)  # read the same rows, not one after the other
        self.twice = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.double_ = nn.Linear(16, 16, dtype=torch.float64)  # not packable
        self.norm = nn.LayerNorm(16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.attention(rows)
        first = self.first(rows)
        rows = self.twice(self.norm(self.twice(first))) + self.second(rows)
        return cast(torch.Tensor, self.double_(rows.double()).float())


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def packed(network: nn.Module, rows: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        pack_linears(network.eval(), lambda: network(rows))
    return network


def product_of(module: object) -> LayerProduct:
    assert isinstance(module, PackedLinear)
    return module.whole


@torch.no_grad()
@pytest.mark.parametrize(
    "biases", [(False, False, False), (True, True, True), (True, False, True), (False, False, True)]
)
def test_the_numbers_stay(rows: torch.Tensor, biases: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    network = Network(biases)
    others = torch.randn(1, 9, 16)
    expected = network(rows), network(others)
    packed(network, rows)
    torch.testing.assert_close((network(rows), network(others)), expected, rtol=1e-5, atol=1e-6)


def test_linears_that_read_the_same_rows_become_one_product(rows: torch.Tensor) -> None:
    network = Network((True, False, False))
    packed(network, rows)
    attention = network.attention
    shared = product_of(attention.q)
    assert product_of(attention.k) is shared
    assert product_of(attention.v) is shared
    assert product_of(attention.o) is not shared
    assert shared(rows).shape == (5, 24)
    assert attention.q(rows).shape == (5, 12)
    assert attention.v.out_features == 8
    assert attention.q.weight.shape == (12, 16)  # what modeling code may look at


def test_linears_with_others_between_them_stay_alone(rows: torch.Tensor) -> None:
    network = packed(Network(), rows)
    assert product_of(network.first) is not product_of(network.second)


def test_linears_of_different_parents_stay_alone(rows: torch.Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, self.left(rows) + self.right(rows))

    network = Two()
    packed(network, rows)
    assert product_of(network.left[0]) is not product_of(network.right[0])


def test_linears_called_twice_or_never_stay(rows: torch.Tensor) -> None:
    network = packed(Network(), rows)
    assert type(network.twice) is nn.Linear
    assert type(network.never) is nn.Linear


def test_what_is_not_a_packable_linear_stays(rows: torch.Tensor) -> None:
    network = packed(Network(), rows)
    assert type(network.double_) is nn.Linear
    assert type(network.norm) is nn.LayerNorm


def test_a_subclass_of_linear_stays(rows: torch.Tensor) -> None:
    class Own(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return super().forward(rows).relu()

    network = packed(nn.Sequential(Own(16, 4)), rows)
    assert type(network.get_submodule("0")) is Own


@torch.no_grad()
def test_nothing_is_kept_alive_after_a_forward(rows: torch.Tensor) -> None:
    network = Network()
    packed(network, rows)
    made: list[weakref.ref[torch.Tensor]] = []
    for name in ("q", "k", "v", "o"):
        linear = network.attention.get_submodule(name)
        linear.register_forward_hook(lambda module, args, out: made.extend(map(weakref.ref, (*args, out))))
    network(torch.randn(3, 16))
    assert len(made) == 8
    assert [ref() for ref in made] == [None] * 8


@torch.no_grad()
def test_rows_that_changed_in_place_are_multiplied_again(rows: torch.Tensor) -> None:
    """A tensor is the same rows only within one call of its siblings."""
    torch.manual_seed(0)
    network = Network()
    plain = Network()
    plain.load_state_dict(network.state_dict())
    packed(network, rows)
    buffer = rows.clone()
    network(buffer)
    buffer.copy_(torch.randn(5, 16))
    torch.testing.assert_close(network(buffer), plain(buffer), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_forward_that_broke_off_between_siblings_does_no_harm(rows: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = Network()
    expected = network(rows)
    packed(network, rows)
    buffer = torch.randn(5, 16)
    network.attention.q(buffer)  # and never k and v
    buffer.copy_(rows)
    torch.testing.assert_close(network(buffer), expected, rtol=1e-5, atol=1e-6)


def test_no_hook_is_left_behind(rows: torch.Tensor) -> None:
    network = packed(Network(), rows)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_products_are_numbered_in_order_each_once(rows: torch.Tensor) -> None:
    network = Network()
    packed(network, rows)
    products = number_products(network)
    alone = (network.attention.o, network.first, network.second)
    assert products == [product_of(module) for module in (network.attention.q, *alone)]
    assert [product.slot for product in products] == [0, 1, 2, 3]
