"""Sums of products: Conv, ConvTranspose, Gemm, MatMul, Einsum.

A sum is known where each of its terms is: both factors are known, or one of them is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from spa.model.traits import Trait, operators
from spa.zero.facts import Site
from spa.zero.known import Known, all_along, along_channels, uniform_along
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray


def foldable(site: Site, operand: int) -> Known:
    """Return the part of an operand whose contribution to a sum of products is known and can move into a bias.

    If the other operand is constant, that is what is known and reaches all positions of the output alike: the borders
    of a padded convolution, and the gaps of a transposed one, see zeros instead. Otherwise it is what is known
    to be zero.
    """
    known = site.known(operand)
    match site.node.key:
        case "Conv" | "ConvTranspose" if operand == 0:
            known = uniform_along(known, [i for i in range(known.value.ndim) if i != 1])
            plain = site.node.op == "Conv" and not padded(site) and site.value(1) is not None
        case "MatMul" | "Gemm" if operand < 2:
            plain = site.value(1 - operand) is not None and min(len(site.shape(0)), len(site.shape(1))) >= 2
        case "Einsum" if len(site.node.inputs) == 2 and operand < 2:
            plain = site.value(1 - operand) is not None and _sums_pair_up(site)
        case _:
            plain = False
    return known if plain or site.value(operand) is not None else known.restricted_to(known.value == 0)


def padded(site: Site) -> bool:
    """Return whether the node pads its input."""
    auto = site.attr("auto_pad", "NOTSET")
    return auto.startswith("SAME") or (auto == "NOTSET" and any(site.attr("pads") or ()))


def _sums_pair_up(site: Site) -> bool:
    """Return whether all letters that an Einsum sums over are in both its operands."""
    left, _, right = site.attr("equation").replace(" ", "").partition("->")
    first, second = left.split(",")
    return "." not in left and not {*left} - {*right, ","} - ({*first} & {*second})


def sum_of_products(site: Site, first: Known, second: Known) -> Known:
    """Compute the sum of products of a Conv, ConvTranspose, MatMul, Gemm or Einsum, without its bias."""
    if site.node.op in ("Conv", "ConvTranspose"):
        return _convolution(site, first)
    if site.node.op == "Einsum":
        return _sum_terms(partial(np.einsum, site.attr("equation")), first, second)
    if site.node.op == "Gemm":
        first = _transposed(first) if site.attr("transA", 0) else first
        second = _transposed(second) if site.attr("transB", 0) else second
    if first.value.ndim < 2 or second.value.ndim < 2:
        return Known(np.zeros((1,) * len(site.out_shape())), np.zeros((1,) * len(site.out_shape()), bool))
    products = _matrix_product(first, second)
    return Known(products.value * site.attr("alpha", 1.0), products.mask) if site.node.op == "Gemm" else products


def _transposed(known: Known) -> Known:
    value, mask = np.broadcast_arrays(known.value, known.mask)
    return Known(value.T, mask.T)


def _matrix_product(a: Known, b: Known) -> Known:
    inner = max(a.value.shape[-1], a.mask.shape[-1], b.value.shape[-2], b.mask.shape[-2])
    if inner > 1:
        a, b = _stretch(a, -1, inner), _stretch(b, -2, inner)
    return _sum_terms(np.matmul, a, b)


def _stretch(known: Known, axis: int, size: int) -> Known:
    def spread(array: Array) -> Array:
        shape = list(array.shape)
        shape[axis] = size
        return np.broadcast_to(array, shape)

    return Known(spread(known.value), spread(known.mask))


def _sum_terms(multiply: Callable[[Array, Array], Array], a: Known, b: Known) -> Known:
    """Multiply two operands; a sum of products is known if none of its terms may vary."""
    may_vary = multiply((~a.zero).astype(np.float32), (~b.zero).astype(np.float32))
    if not (a.nonzero.any() and b.nonzero.any()):
        return Known(np.zeros((1,) * may_vary.ndim), may_vary == 0)
    known = multiply(a.nonzero.astype(np.float32), b.nonzero.astype(np.float32))  # counts of terms, exact to 2^24
    value = multiply(*(np.where(k.nonzero, k.value, 0).astype(np.float64) for k in (a, b)))
    return Known(value, may_vary == known)


def _convolution(site: Site, x: Known) -> Known:
    """Convolve an input that is the same at all positions."""
    w, rank = site.value(1), len(site.shape(0))
    if w is None:
        return Known(np.zeros((1,) * rank), np.zeros((1,) * rank, bool))
    groups, channels = site.attr("group", 1), site.shape(0)[1]
    taps = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    if site.node.op == "ConvTranspose":
        taps = taps.swapaxes(1, 2)
    mask = np.broadcast_to(all_along(x.mask, 1, channels), channels).reshape(groups, -1, 1)
    value = np.broadcast_to(x.value.reshape(-1), channels).astype(np.float64).reshape(groups, -1, 1)
    unknown = (taps != 0).any(axis=-1).astype(np.float32) @ ~mask
    total = taps.sum(axis=-1, dtype=np.float64) @ np.where(mask, value, 0)
    return Known(along_channels(total.reshape(-1), rank), along_channels(unknown.reshape(-1) == 0, rank))


@transfer(*operators(Trait.BIASED))
def biased_product(site: Site) -> KnownOutputs:
    """Add the bias to the sum of products."""
    products = sum_of_products(site, foldable(site, 0), foldable(site, 1))
    if not products.mask.any():
        return None
    dtype = site.known(0).value.dtype
    if not site.has(2):
        return [Known(products.value.astype(dtype), products.mask)]
    bias = site.known(2)
    value, mask = bias.value.astype(np.float64) * site.attr("beta", 1.0), bias.mask
    if site.node.op != "Gemm":
        value, mask = (along_channels(np.broadcast_to(a, bias.value.shape), len(site.shape(0))) for a in (value, mask))
    return [Known((products.value + np.where(mask, value, 0)).astype(dtype), products.mask & mask)]


@transfer("Einsum")
def einsum(site: Site) -> KnownOutputs:
    """Compute the sum of products of two operands."""
    terms = site.attr("equation").replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or any(len({*t}) < len(t) for t in terms):
        return None
    products = sum_of_products(site, foldable(site, 0), foldable(site, 1))
    return [Known(products.value.astype(site.known(0).value.dtype), products.mask)]


@transfer("MatMul")
def matmul(site: Site) -> KnownOutputs:
    """Compute the sum of products; a softmax times values that are all the same is that value."""
    products = sum_of_products(site, foldable(site, 0), foldable(site, 1))
    value, mask = products.value, products.mask
    if _sums_to_one(site, site.node.inputs[0]):
        same = uniform_along(site.known(1), [-2])
        value, mask = np.where(same.mask, same.value, value), mask | same.mask
    return [Known(value.astype(site.known(0).value.dtype), mask)]


def _sums_to_one(site: Site, name: str) -> bool:
    """Return whether a tensor is a softmax along its last axis."""
    node = site.facts.graph.producer.get(name)
    if node is None or node.op != "Softmax":
        return False
    rank = len(site.facts.analysis.points.first.shape[name])
    return bool(node.attributes.get("axis", -1 if node.version >= 13 else 1) in (-1, rank - 1))
