"""Products of matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spa.exporters.jax_operators import Array, Call, operator
from spa.exporters.jax_operators.windows import fused_activation
from spa.model.graph import Node

MS = "com.microsoft::"


@operator("MatMul")
def matmul(call: Call, a: Array, b: Array) -> Array:
    """Multiply as numpy does."""
    return call.xp.matmul(a, b)


@operator("Gemm", MS + "FusedGemm", MS + "GemmFastGelu")
def gemm(call: Call, a: Array, b: Array, c: Array | None = None) -> Array:
    """Compute alpha A B + beta C, of matrices that may be transposed first."""
    a = a.T if call.attr("transA", 0) else a
    b = b.T if call.attr("transB", 0) else b
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    y = jnp.matmul(a, b)
    y = y if alpha == 1 else (alpha * y).astype(y.dtype)
    y = y if c is None else y + (c if beta == 1 else jnp.asarray(beta * c, y.dtype))
    if call.node.op == "GemmFastGelu":
        return jax.nn.gelu(y, approximate=True)
    return fused_activation(call, y) if call.node.op == "FusedGemm" else y


def _batches(node: Node) -> str | None:
    moved = node.attributes.get("transBatchA", 0) or node.attributes.get("transBatchB", 0)
    return "its batches are transposed" if moved else None


@operator(MS + "FusedMatMul", MS + "TransposeMatMul", refusal=_batches)
def fused_matmul(call: Call, a: Array, b: Array) -> Array:
    """Compute alpha A B, of matrices that may be transposed first."""
    a = jnp.swapaxes(a, -1, -2) if call.attr("transA", 0) else a
    b = jnp.swapaxes(b, -1, -2) if call.attr("transB", 0) else b
    return call.attr("alpha", 1.0) * jnp.matmul(a, b)


@operator("Einsum")
def einsum(call: Call, *operands: Array) -> Array:
    """Sum products as numpy does."""
    return jnp.einsum(call.attr("equation"), *operands)


@operator("Det")
def det(call: Call, x: Array) -> Array:
    """Return determinants of the last two axes."""
    return jnp.linalg.det(x)
