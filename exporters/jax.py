"""ONNX to JAX: any graph as a jittable, differentiable function, and pruned weights back into JAX's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto

from spa.errors import ModelError, UnsupportedError
from spa.exporters.jax_modules import write_back
from spa.extras import extra
from spa.model.graph import Graph, Node, constant_tensor, domain_of, tensor_array
from spa.model.io import load
from spa.model.normalise import normalise

if TYPE_CHECKING:
    from spa.exporters.jax_operators import Law

__all__ = ["function", "write_back"]

Params = dict[str, Any]


def function(
    model: ModelProto, base: Path | None = None, names: Mapping[str, str] | None = None
) -> tuple[Callable[..., Any], Params]:
    """Make a JAX function, of weights and inputs, of a model.

    The function can be jitted, differentiated and mapped; sizes are fixed when it is traced, and integers that follow
    from them are computed beforehand in numpy. Networks are computed as in inference: BatchNormalization uses its
    running statistics, through which no gradient flows, and Dropout passes. 64-bit numbers are 32-bit ones unless
    ``jax_enable_x64`` is set.

    Args:
        model: the model.
        base: the folder of its external data.
        names: what to call initializers in the parameters, such as :attr:`spa.importers.Imported.names`.

    Returns:
        ``fn(params, *inputs)``, which gives one array, or a tuple where the model has several outputs; and ``params``:
        the floating-point initializers of rank 1 or more, and those in `names`, by name.

    Raises:
        UnsupportedError: an operator is not covered, or JAX is missing.
        ModelError: the model is malformed. The function itself raises it on inputs that do not fit.
    """
    with extra("jax"):
        import jax  # noqa: F401
    import jax.numpy as jnp

    graph = Graph(load(model).model if base is None else normalise(model, own=False), base)
    block = _Block.of(graph.model.graph, _versions(graph.model), base)
    called = dict(names or {})
    weights = [n for n in graph.initializers if n in called or _is_weight(block, n)]
    params = {called.get(n, n): jnp.asarray(block.constants.pop(n)) for n in weights}

    def fn(params: Mapping[str, Any], *inputs: Any) -> Any:
        if len(inputs) != len(graph.inputs):
            raise ModelError(
                f"the model takes {len(graph.inputs)} inputs {graph.inputs}, not {len(inputs)}. Give one for each."
            )
        values = {n: jnp.asarray(params[called.get(n, n)]) for n in weights}
        values |= {n: jnp.asarray(x) for n, x in zip(graph.inputs, inputs, strict=True)}
        outputs = [jnp.asarray(v) for v in block.run(values)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return fn, params


def _versions(model: ModelProto) -> dict[str, int]:
    return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}


def _is_weight(block: _Block, name: str) -> bool:
    """Tell whether an initializer is a parameter: floats, no scalar, and nothing that JAX must know beforehand."""
    value = block.constants[name]
    floating = value.dtype.kind == "f" or value.dtype.name == "bfloat16"
    return floating and value.ndim > 0 and name not in block.needed


@dataclass(frozen=True)
class _Block:
    """A graph ready to run.

    Attributes:
        steps: its nodes with their laws and subgraphs.
        constants: values of initializers and Constant nodes.
        needed: tensors that must be known at trace time.
        inputs: the names of its inputs.
        outputs: the names of its outputs.
    """

    steps: list[tuple[Node, Law, dict[str, _Block]]]
    constants: dict[str, np.ndarray]
    needed: set[str]
    inputs: list[str]
    outputs: list[str]

    @staticmethod
    def of(graph: GraphProto, versions: Mapping[str, int], base: Path | None) -> _Block:
        """Look up the laws of a graph's operators.

        Raises:
            UnsupportedError: one is not covered.
        """
        constants = {t.name: tensor_array(t, base) for t in graph.initializer}
        steps: list[tuple[Node, Law, dict[str, _Block]]] = []
        needed: set[str] = set()
        for index, proto in enumerate(graph.node):
            node = Node(proto, index, versions.get(domain_of(proto), 1))
            tensor = constant_tensor(node) if node.key == "Constant" else None
            if tensor is not None:
                constants[node.outputs[0]] = tensor_array(tensor)
                continue
            law = _law(node)
            inner = {a.name: _Block.of(a.g, versions, base) for a in proto.attribute if a.type == AttributeProto.GRAPH}
            needed.update(node.inputs[i] for i in law.static if i < len(node.inputs))
            needed.update(*(b.needed for b in inner.values()))
            steps.append((node, law, inner))
        constant_names = {t.name for t in graph.initializer}
        inputs = [i.name for i in graph.input if i.name not in constant_names]
        return _Block(steps, constants, needed, inputs, [o.name for o in graph.output])

    def run(self, outer: Mapping[str, Any]) -> list[Any]:
        """Compute the outputs from the inputs and what the graphs around it have computed."""
        import jax.numpy as jnp

        from spa.exporters.jax_operators import Call, is_known

        values: dict[str, Any] = {**outer, **self.constants}
        for node, law, inner in self.steps:
            operands = [values[n] if n else None for n in node.inputs]
            known = all(is_known(v) for v in operands if v is not None)
            blocks = {name: _bound(block, values) for name, block in inner.items()}
            call = Call(node, np if known else jnp, blocks)
            try:
                with np.errstate(all="ignore"):
                    results = law.run(call, *operands)
            except (TypeError, ValueError, IndexError) as error:
                raise ModelError(f"{node.label}: {error}. Check the shapes and types of the inputs.") from error
            results = results if isinstance(results, tuple) else (results,)
            for name, value in zip(node.outputs, results, strict=False):
                values[name] = np.asarray(value) if is_known(value) else value
        return [values[n] for n in self.outputs]


def _bound(block: _Block, values: Mapping[str, Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """Make a function of a subgraph, of its own inputs."""
    return lambda operands: block.run({**values, **dict(zip(block.inputs, operands, strict=True))})


def _law(node: Node) -> Law:
    """Return how a node is computed.

    Raises:
        UnsupportedError: its operator, or this use of it, is not covered.
    """
    from spa.exporters.jax_operators import laws

    law = laws().get(node.key)
    if law is None:
        remedy = f"Register one with @spa.exporters.jax_operators.operator({node.key!r})"
        raise UnsupportedError(f"{node.label}: there is no JAX function for {node.key}. {remedy}.")
    reason = law.refusal(node)
    if reason is not None:
        raise UnsupportedError(f"{node.label}: {reason}. Export the model without it, or keep the ONNX model.")
    return law
