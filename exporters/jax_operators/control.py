"""Subgraphs: branches and loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa.errors import UnsupportedError
from spa.exporters.jax_operators import Array, Call, is_known, operator
from spa.model.graph import Node


@operator("If")
def branch(call: Call, condition: Array) -> tuple[Array, ...]:
    """Run one of two subgraphs; both are compiled where the condition is not known."""
    then, otherwise = call.blocks["then_branch"], call.blocks["else_branch"]
    if is_known(condition):
        return tuple((then if condition.ravel()[0] else otherwise)([]))

    def traced(block: Any) -> Any:
        return lambda: [jnp.asarray(v) for v in block([])]

    return tuple(jax.lax.cond(condition.reshape(()), traced(then), traced(otherwise)))


@operator("Loop", static=[0, 1])
def loop(call: Call, times: Array | None, condition: Array | None, *states: Array) -> tuple[Array, ...]:
    """Run a body a known number of times, unrolled; its condition may end it, where that is known."""
    body = call.blocks["body"]
    count = None if times is None else int(call.known(times, "the number of iterations").ravel()[0])
    going: Array = np.asarray(True) if condition is None else condition
    kept, seen, step = list(states), [], 0
    while (count is None or step < count) and bool(call.known(going, "the condition").ravel()[0]):
        going, *rest = body([np.asarray(step, np.int64), going, *kept])
        kept, records = rest[: len(states)], rest[len(states) :]
        seen.append(records)
        step += 1
    if not seen and len(call.node.outputs) > len(states):
        raise UnsupportedError(
            f"{call.node.label}: it runs no iteration, so that its records have no known shape. Export "
            "the model without this loop."
        )
    return (*kept, *(jnp.stack([jnp.asarray(r[i]) for r in seen]) for i in range(len(seen[0] if seen else []))))


def _directions(node: Node) -> str | None:
    names = ("scan_input_directions", "scan_output_directions", "scan_input_axes", "scan_output_axes")
    if any(any(node.attributes.get(name, [])) for name in names):
        return "it scans backwards, or along an axis that is not the first"
    return "it has the form of opset 8" if node.version < 9 else None


@operator("Scan", refusal=_directions)
def scan(call: Call, *operands: Array) -> tuple[Array, ...]:
    """Run a body over the first axis of sequences, carrying states."""
    count = len(operands) - call.attr("num_scan_inputs")
    start = [jnp.asarray(v) for v in operands[:count]]
    sequences = [jnp.asarray(v) for v in operands[count:]]

    def step(carry: Any, now: Any) -> Any:
        outputs = [jnp.asarray(v) for v in call.blocks["body"]([*carry, *now])]
        return outputs[:count], outputs[count:]

    last, seen = jax.lax.scan(step, start, sequences)
    return (*last, *seen)
