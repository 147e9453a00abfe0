"""The algebra of sizes against numbers: what it proves holds for every size tried."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.graph.symbols import Expr, Symbol, ceil, divide, exact, expr, floor, least, ratio, substitute

H, W = Symbol("H"), Symbol("W")
SIZES = st.fixed_dictionaries({H: st.integers(1, 200), W: st.integers(1, 200)})


def expressions() -> st.SearchStrategy[Expr]:
    leaves = st.sampled_from([expr(H), expr(W), expr(1), expr(2), expr(-3)])
    fractions = st.sampled_from([Fraction(1, 2), Fraction(1, 4), Fraction(3, 2), Fraction(-1, 2), Fraction(1, 3)])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a + b, inner, inner),
            st.builds(lambda a, b: a - b, inner, inner),
            st.builds(lambda a, k: floor(a * k), inner, fractions),
            st.builds(lambda a, k: ceil(a * k), inner, fractions),
            st.builds(lambda a, k: a * k, inner, st.integers(-3, 3)),
        ),
        max_leaves=8,
    )


@given(expressions(), expressions(), SIZES)
def test_arithmetic_is_that_of_numbers(a: Expr, b: Expr, sizes: dict[Symbol, int]) -> None:
    x, y = substitute(a, sizes), substitute(b, sizes)
    assert substitute(a + b, sizes) == x + y
    assert substitute(a - b, sizes) == x - y
    assert substitute(a * b, sizes) == x * y
    for k in (Fraction(1, 2), Fraction(3, 4), Fraction(-2, 3), Fraction(1, 16)):
        assert substitute(floor(a * k), sizes) == math.floor(x * k)
        assert substitute(ceil(a * k), sizes) == math.ceil(x * k)


@given(expressions(), SIZES)
def test_bounds_hold(a: Expr, sizes: dict[Symbol, int]) -> None:
    bound = least(a)
    assume(bound is not None)
    assert bound is not None
    assert substitute(a, sizes) >= bound


@given(expressions(), st.sampled_from([Fraction(2), Fraction(1, 2), Fraction(-3)]))
def test_constant_ratios_are_found(a: Expr, k: Fraction) -> None:
    assume(bool(a.terms))
    assert ratio(a * k, a) == k
    assert ratio(a + 1, a) is None or (a + 1).constant is not None


def test_pooling_chains_meet() -> None:
    half = floor(expr(H) * Fraction(1, 2))
    quarter = floor(half * Fraction(1, 2))
    assert quarter == floor(expr(H) * Fraction(1, 4))
    assert floor((expr(H) - 2) * Fraction(1, 2)) + 1 == half
    rest = half - quarter * 2
    assert least(rest) == 0
    assert floor(rest * Fraction(1, 2)).integer == 0
    assert ceil(expr(H) * Fraction(1, 2)) == floor((expr(H) - 1) * Fraction(1, 2)) + 1


def test_a_promised_multiple_divides() -> None:
    size = expr(H) * 16
    down = size
    for _ in range(4):
        down = floor((down - 2) * Fraction(1, 2)) + 1
    assert ratio(size, down) == 16
    assert floor(size * Fraction(1, 32)).integer is None


def test_products_divide_term_by_term() -> None:
    assert divide(expr(H) * expr(W) * 6, expr(W) * 2) == expr(H) * 3
    assert divide(expr(H) + expr(W), expr(W)) is None
    assert divide(expr(H) * 2, expr(H) + 1) is None


@pytest.mark.parametrize(
    ("factor", "held"), [(2, True), (0.5, True), (1.5, True), (0.1, False), (Fraction(1, 3), False), (511, False)]
)
def test_float32_holds_sizes_times_short_factors_only(factor: float, held: bool) -> None:
    assert exact(expr(H) * Fraction(factor)) is held
