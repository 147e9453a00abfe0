"""Exact arithmetic on sizes that are not known yet: polynomials over axis symbols and floors.

An expression is a sum of rational coefficients times products of atoms; an atom is a symbol (the size of an axis, an
integer) or the floor of an expression. Expressions are kept in one canonical form, so that equal forms are equal sizes:

1. ``floor(e)``: every integer part of a coefficient moves out, since all atoms are integers:
   ``floor(S/2 - F) = floor(S/2) - F``, ``floor(-S/2) = floor(S/2) - S``.
2. ``floor((floor(e) + k) / n) = floor((e + k) / n)`` for whole k and n > 0, so pooling chains meet again.

Not every true equality is found (that would need a decision procedure); one that is found holds. Sources of the rules:
Graham, Knuth, Patashnik, "Concrete Mathematics", section 3.1 and equation (3.11).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True, order=True)
class Symbol:
    """An integer that is not known before run time, at least ``least``. Equal names are equal sizes."""

    name: str
    least: int = 1


@dataclass(frozen=True)
class Floor:
    """Floor of an expression that is no integer by its form alone."""

    inner: Expr


Atom: TypeAlias = "Symbol | Floor"
# No image has more rows.
LARGEST = 2**16
FLOAT32_BITS = 24
# A product of atoms in a fixed order; empty for the constant term.
Product: TypeAlias = "tuple[Atom, ...]"


@dataclass(frozen=True)
class Expr:
    """A canonical expression: its terms, none of them zero, in a fixed order."""

    terms: tuple[tuple[Product, Fraction], ...]

    def __add__(self, other: Expr | int | Fraction) -> Expr:
        total = dict(self.terms)
        for product, factor in expr(other).terms:
            total[product] = total.get(product, Fraction(0)) + factor
        return _canonical(total)

    def __mul__(self, other: Expr | int | Fraction) -> Expr:
        total: dict[Product, Fraction] = {}
        for left, a in self.terms:
            for right, b in expr(other).terms:
                product = tuple(sorted(left + right, key=_order))
                total[product] = total.get(product, Fraction(0)) + a * b
        return _canonical(total)

    def __neg__(self) -> Expr:
        return self * -1

    def __sub__(self, other: Expr | int | Fraction) -> Expr:
        return self + -expr(other)

    def __str__(self) -> str:
        parts = []
        for product, factor in self.terms:
            atoms = [a.name if isinstance(a, Symbol) else f"floor({a.inner})" for a in product]
            parts.append("*".join(([str(factor)] if factor != 1 or not atoms else []) + atoms))
        return " + ".join(parts) or "0"

    @property
    def constant(self) -> Fraction | None:
        """The value of an expression without atoms; None for others."""
        if not self.terms:
            return Fraction(0)
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def integer(self) -> int | None:
        """The value of a constant whole expression; None for others."""
        value = self.constant
        return int(value) if value is not None and value.denominator == 1 else None

    @property
    def whole(self) -> bool:
        """Whether the form alone makes every value an integer."""
        return all(factor.denominator == 1 for _, factor in self.terms)


def expr(value: Expr | int | Fraction | Atom) -> Expr:
    """A number or an atom as an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, (Symbol, Floor)):
        return Expr((((value,), Fraction(1)),))
    return _canonical({(): Fraction(value)})


def floor(value: Expr) -> Expr:
    """The greatest integer not above the value."""
    outside = _canonical({product: Fraction(math.floor(factor)) for product, factor in value.terms})
    rest = value - outside
    # The constant matters only up to the grid that the other terms lie on: floor(S/2 + 1/3) = floor(S/2).
    grid = math.lcm(*(factor.denominator for product, factor in rest.terms if product))
    constant = dict(rest.terms).get((), Fraction(0))
    rest = rest - constant + Fraction(math.floor(constant * grid), grid)
    moving = [(product, factor) for product, factor in rest.terms if product]
    if not moving:
        return outside
    if len(moving) == 1 and moving[0][1].numerator == 1 and len(moving[0][0]) == 1:
        atom, factor = moving[0][0][0], moving[0][1]
        if isinstance(atom, Floor):  # rule 2: the constant is k / n by the grid
            return outside + floor(atom.inner * factor + dict(rest.terms).get((), Fraction(0)))
    return outside + expr(Floor(rest))


def ceil(value: Expr) -> Expr:
    """The least integer not below the value: floor(e + (q-1)/q), where e is a multiple of 1/q."""
    grid = math.lcm(*(factor.denominator for _, factor in value.terms))
    return floor(value + Fraction(grid - 1, grid))


def least(value: Expr) -> Fraction | None:
    """A lower bound of the value over all sizes; None where none is found."""
    bounds = [bound for bound in (_linear_bound(value), _term_bound(value)) if bound is not None]
    if not bounds:
        return None
    return Fraction(math.ceil(max(bounds))) if value.whole else max(bounds)


def nonnegative(value: Expr) -> bool:
    bound = least(value)
    return bound is not None and bound >= 0


def ratio(top: Expr, bottom: Expr) -> Fraction | None:
    """The constant k with top = k · bottom for all sizes; None where there is none."""
    if not bottom.terms or len(top.terms) != len(bottom.terms):
        return None
    k = top.terms[0][1] / bottom.terms[0][1]
    return k if top == bottom * k else None


def divide(top: Expr, bottom: Expr) -> Expr | None:
    """The expression q with top = q · bottom, where ``bottom`` is one product; None where there is none."""
    if len(bottom.terms) != 1:
        k = ratio(top, bottom)
        return None if k is None else expr(k)
    ((divisor, factor),) = bottom.terms
    total: dict[Product, Fraction] = {}
    for product, coefficient in top.terms:
        left = list(product)
        for atom in divisor:
            if atom not in left:
                return None
            left.remove(atom)
        total[tuple(left)] = coefficient / factor
    return _canonical(total)


def exact(value: Expr) -> bool:
    """Whether float32 holds the value, and what was rounded to get there, for every size up to LARGEST."""
    grid = math.lcm(*(factor.denominator for _, factor in value.terms))
    if grid & (grid - 1) or grid > LARGEST or any(len(product) > 1 for product, _ in value.terms):
        return False
    if len(value.terms) == 1:
        odd = abs(value.terms[0][1].numerator)
        return odd.bit_length() + LARGEST.bit_length() - 1 <= FLOAT32_BITS
    largest = sum(abs(factor) * grid * (LARGEST if product else 1) for product, factor in value.terms)
    return bool(largest <= 2**FLOAT32_BITS)


def substitute(value: Expr, sizes: Mapping[Symbol, int]) -> Fraction:
    """The value for given sizes of every symbol in it."""
    total = Fraction(0)
    for product, factor in value.terms:
        term = factor
        for atom in product:
            term *= sizes[atom] if isinstance(atom, Symbol) else math.floor(substitute(atom.inner, sizes))
        total += term
    return total


def _canonical(terms: Mapping[Product, Fraction]) -> Expr:
    kept = [(product, factor) for product, factor in terms.items() if factor]
    return Expr(tuple(sorted(kept, key=lambda term: [_order(atom) for atom in term[0]])))


def _order(atom: Atom) -> tuple[int, str]:
    return (0, atom.name) if isinstance(atom, Symbol) else (1, str(atom.inner))


def _linear_bound(value: Expr) -> Fraction | None:
    """Replaces floors by what bounds them from the side that matters: x - (q-1)/q <= floor(x) <= x."""
    for _ in range(64):
        found = next(
            ((product[0], factor) for product, factor in value.terms if len(product) == 1 and _is_floor(product[0])),
            None,
        )
        if found is None:
            break
        atom, factor = found
        assert isinstance(atom, Floor)
        steps = math.lcm(*(f.denominator for _, f in atom.inner.terms))
        slack = Fraction(steps - 1, steps) if factor > 0 else Fraction(0)
        value = value - expr(atom) * factor + (atom.inner - slack) * factor
    return _term_bound(value)


def _term_bound(value: Expr) -> Fraction | None:
    """The sum of every term's own bound."""
    total = Fraction(0)
    for product, factor in value.terms:
        if not product:
            total += factor
            continue
        bounds = [_atom_bound(atom) for atom in product]
        if factor < 0 or any(bound is None or bound < 0 for bound in bounds):
            return None
        total += factor * math.prod(bound for bound in bounds if bound is not None)
    return total


def _atom_bound(atom: Atom) -> int | None:
    if isinstance(atom, Symbol):
        return atom.least
    inner = least(atom.inner)
    return None if inner is None else math.floor(inner)


def _is_floor(atom: Atom) -> bool:
    return isinstance(atom, Floor)
