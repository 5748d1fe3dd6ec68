"""Surgery: slice the weights, restate the integers that depend on them, and leave everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.algebra.axes import Axes, Kept
from spa.algebra.op import Tie
from spa.coupling.analysis import Analysis, Branch, Detour, Part
from spa.coupling.plan import Plan, dropped
from spa.model.files import INLINE
from spa.model.graph import Graph, dead_nodes, names_read
from spa.model.slices import Slices
from spa.surgery.conform import conform
from spa.surgery.integers import correct, restated, wrong_operands

Message = TypeVar("Message", NodeProto, ValueInfoProto)
Key = tuple[int, int]  # (node index, operand)
Value = np.ndarray | Slices


def apply(analysis: Analysis, plan: Plan) -> ModelProto:
    """Apply a plan to a copy of the model. The same model and plan give the same bytes.

    Args:
        analysis: the model, which is not changed.
        plan: the channels to keep.

    Returns:
        The pruned model.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedError: an integer that follows the input cannot be restated.
        InvariantError: the pruned graph contradicts the algebra (a bug of ours).
    """
    return describe(analysis, plan, least=None).model


@dataclass(frozen=True)
class Described:
    """A pruned model whose large weights are descriptions of what is kept of the dense ones.

    Attributes:
        model: the message, with placeholders for these weights.
        slices: the descriptions by initializer.
    """

    model: ModelProto
    slices: Mapping[str, Slices]


def describe(analysis: Analysis, plan: Plan, least: int | None = INLINE) -> Described:
    """Apply a plan to a copy of the model without reading the large weights that lie outside of its message.

    Args:
        analysis: the model, which is not changed.
        plan: the channels to keep.
        least: bytes of what is kept, from which on it is described; None describes nothing.

    Raises:
        PlanError: as :func:`apply`.
        UnsupportedError: as :func:`apply`.
        InvariantError: as :func:`apply`.
    """
    surgeon = _Surgeon(analysis, analysis.kept(plan.masks(analysis)), least)
    return Described(model=surgeon.operate(), slices=surgeon.slices)


class _Surgeon:
    """The rewriting of one model under one plan; :meth:`operate` may be called once.

    Attributes:
        analysis: the original model.
        graph: the view of the original model, which is not changed.
        kept: the indices to keep.
        least: bytes from which on a weight that lies outside is described; None describes none.
        slices: what is described, by initializer.
        model: the message that is rewritten; without initializers until the end.
        nodes: the nodes of ``model``, by their old indices.
        names: all tensor names that are taken.
        new: initializers that replace old ones or are added.
        gone: the parts that go.
        inserted: new nodes by the index of the node that they stand before.
    """

    def __init__(self, analysis: Analysis, kept: Kept, least: int | None) -> None:
        self.analysis, self.graph, self.kept, self.least = analysis, analysis.graph, kept, least
        self.slices: dict[str, Slices] = {}
        self.model = _without_weights(analysis.graph.model)
        self.gone = dropped(analysis, kept)
        self.names = set(self.graph.users) | set(self.graph.producer) | set(self.graph.initializers)
        self.new: dict[str, TensorProto] = {}
        self.inserted: dict[int, list[NodeProto]] = {}
        self.nodes: list[NodeProto] = list(self.model.graph.node)

    def operate(self) -> ModelProto:
        """Rewrite the model and return it."""
        self._branches()
        self._weights()
        self._attributes()
        self._interface()
        scaled = self._detours()
        self._computed()
        for index, name in scaled.items():
            self.nodes[index].input[0] = name
        self._assemble()
        return conform(self.model)

    def fresh(self, base: str) -> str:
        """Return a tensor name that is not taken, and take it."""
        name, count = base, 2
        while name in self.names:
            name, count = f"{base}_{count}", count + 1
        self.names.add(name)
        return name

    # -- parts that go -------------------------------------------------------------------------------------------

    def _branches(self) -> None:
        """Put a constant of zeros, which repair fits, in the place of each branch that goes."""
        for branch in self.gone:
            if isinstance(branch, Branch):
                node = self.nodes[branch.sum]
                node.input[branch.operand] = self._stand_in(branch, node.input[branch.operand], "constant", 0)

    def _detours(self) -> dict[int, str]:
        """Put a scale of ones and a shift of zeros, which repair fits, in the place of each detour that goes.

        Returns:
            By the index of a detour's end the tensor that the Add there shall read; until integers are checked, when
            nodes must lie where they were, it reads where the detour begins.
        """
        scaled = {}
        for detour in self.gone:
            if isinstance(detour, Detour):
                target = self.graph.nodes[detour.end].outputs[0]
                scale, shift = (self._stand_in(detour, target, what, n) for what, n in (("scale", 1), ("shift", 0)))
                scaled[detour.end] = self.fresh(f"{target}_scaled")
                self.inserted[detour.end] = [helper.make_node("Mul", [detour.source, scale], [scaled[detour.end]])]
                name = self.nodes[detour.end].name
                add = helper.make_node("Add", [detour.source, shift], [target], name=name)
                self.nodes[detour.end].CopyFrom(add)
        return scaled

    def _stand_in(self, part: Part, tensor: str, what: str, value: int) -> str:
        """Return the name of a new constant of one number per index of a part's axes."""
        shape = [self.kept.size(e) if i in part.axes else 1 for i, e in enumerate(self.analysis.axes[tensor])]
        dtype = helper.tensor_dtype_to_np_dtype(self.analysis.points.first.dtype[tensor])
        name = self.fresh(f"{self.graph.nodes[part.end].outputs[0]}_{what}")
        filled = np.full(shape[min(part.axes, default=len(shape)) :], value, dtype)
        self.new[name] = numpy_helper.from_array(filled, name)
        return name

    # -- constants -----------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        """Slice every constant as each of its uses demands; uses that demand the same value read one copy."""
        demands: dict[str, dict[Key, Value]] = {}
        for (name, index, operand), axes in self.analysis.uses.items():
            if self.kept.touches(axes):
                value = self._sliced(name, axes)
                keys = [(index, operand)] if index >= 0 else [(n.index, o) for n, o in self.graph.users[name]]
                demands.setdefault(name, {}).update(dict.fromkeys(keys, value))
        for law in self.analysis.laws.values():
            for tie in law.ties:
                if tie.operand is None or tie.operand >= len(law.node.inputs):
                    continue
                if (name := law.node.inputs[tie.operand]) in self.graph.constants:
                    old = self.graph.array(name)
                    value = restated(tie, self.kept, old)
                    if value.shape != old.shape or not np.array_equal(value, old):
                        demands.setdefault(name, {})[(law.node.index, tie.operand)] = value
        for name, by_use in demands.items():
            self._variants(name, by_use)

    def _sliced(self, name: str, axes: Axes) -> Value:
        stored = self._described(name, axes)
        if stored is not None:
            return stored
        value = self.graph.array(name)
        for axis, expr in enumerate(axes):
            if self.kept.size(expr) != expr.size:
                value = np.compress(self.kept.mask(expr), value, axis=axis)
        return np.ascontiguousarray(value)

    def _described(self, name: str, axes: Axes) -> Slices | None:
        """Return a description of what is kept of a large weight that lies outside, or None."""
        whole = None
        if self.least is not None and name in self.graph.initializers:
            whole = Slices.whole(self.graph.constants[name], self.graph.base)
        if whole is None or self.least is None:
            return None
        masks = (None if self.kept.size(expr) == expr.size else self.kept.mask(expr) for expr in axes)
        slices = replace(whole, masks=tuple(masks))
        return slices if slices.nbytes >= self.least else None

    def _variants(self, name: str, by_use: Mapping[Key, Value]) -> None:
        """Store each different value that the uses of a constant demand; the first takes the name if nothing keeps it.

        Args:
            name: the constant.
            by_use: the new value by (node index, operand); uses that are not named keep the old one.
        """
        all_uses = {(n.index, o) for n, o in self.graph.users.get(name, ())}
        captured = any(name in names for names in self.graph.captured.values())
        taken = captured or name in self.graph.outputs or bool(all_uses - by_use.keys())
        variants: list[tuple[Value, str]] = []
        for (index, operand), value in sorted(by_use.items(), key=lambda item: item[0]):
            alias = next((a for other, a in variants if other is value or _same(other, value)), "")
            if not alias:
                alias = self.fresh(f"{name}_pruned") if taken else name
                taken = True
                variants.append((value, alias))
                self._store(name, alias, value)
            if alias != name:
                self.nodes[index].input[operand] = alias

    def _store(self, name: str, alias: str, value: Value) -> None:
        if isinstance(value, Slices):
            self.slices[alias], self.new[alias] = value, value.placeholder(alias)
            return
        old = self.graph.constants[name]
        tensor = numpy_helper.from_array(value, alias)
        tensor.data_type = old.data_type  # types that share a numpy dtype
        tensor.doc_string = old.doc_string
        tensor.metadata_props.extend(old.metadata_props)
        if alias == name and name in self.graph.constant_nodes:
            node = self.nodes[self.graph.constant_nodes[name].index]
            tensor.name = ""
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", tensor))
        else:
            self.new[alias] = tensor

    # -- attributes and declared shapes --------------------------------------------------------------------------

    def _attributes(self) -> None:
        for index, law in self.analysis.laws.items():
            for tie in law.ties:
                if tie.attribute is not None:
                    old = law.node.attributes.get(tie.attribute)
                    value = tie.restate(self.kept, old)
                    value = value.tolist() if isinstance(value, np.ndarray) else value
                    if value != old:
                        _set_attribute(self.nodes[index], tie.attribute, value)
                elif tie.operand is not None and tie.operand >= len(law.node.inputs):
                    self._append(index, tie)

    def _append(self, index: int, tie: Tie) -> None:
        """Give a node an operand that it lacks, where it now needs one."""
        value = tie.restate(self.kept, None)
        node = self.nodes[index]
        if value is not None and tie.operand == len(node.input):
            name = self.fresh(f"{node.output[0]}_{tie.operand}")
            self.new[name] = numpy_helper.from_array(value, name)
            node.input.append(name)

    def _interface(self) -> None:
        """Restate declared shapes; drop those that contradict the walk."""
        graph = self.model.graph
        stale = [i for i in graph.value_info if not self._redeclare(i, self.analysis.axes.get(i.name))]
        for info in stale:
            graph.value_info.remove(info)

    def _redeclare(self, info: ValueInfoProto, axes: Axes | None) -> bool:
        """Restate a declared shape; return False where it contradicts the axes."""
        dims = info.type.tensor_type.shape.dim
        if axes is None or not info.type.tensor_type.HasField("shape"):
            return True
        if len(dims) != len(axes):
            return False
        for dim, expr in zip(dims, axes, strict=True):
            size = self.kept.size(expr)
            if size != expr.size:
                if dim.HasField("dim_value"):
                    dim.dim_value = dim.dim_value * size // expr.size if dim.dim_value != expr.size else size
                else:
                    dim.ClearField("dim_param")
        return True

    # -- computed integers ---------------------------------------------------------------------------------------

    def _computed(self) -> None:
        """Give every computed operand whose value is wrong after pruning the value that the algebra expects."""
        pruned = Graph(self.model, self.graph.base, self.graph.initializers | self.new)
        for wrong in wrong_operands(self.analysis, self.kept, pruned):
            correction = correct(wrong, self.fresh)
            self.new.update(correction.constants)
            if correction.nodes:
                self.inserted.setdefault(wrong.node.index, []).extend(correction.nodes)
            self.nodes[wrong.node.index].input[wrong.operand] = correction.name

    # -- putting together ----------------------------------------------------------------------------------------

    def _store_initializers(self) -> None:
        """Store initializers in their old order, changed ones replaced, new ones last, unused ones left out."""
        graph = self.model.graph
        used = names_read(graph)
        initializers = self.graph.initializers | self.new
        graph.initializer.extend(tensor for name, tensor in initializers.items() if name in used)
        kept_inputs = [_copied(i) for i in graph.input if i.name in used or i.name not in initializers]
        del graph.input[:]
        graph.input.extend(kept_inputs)

    def _assemble(self) -> None:
        """Put inserted nodes before their readers, and remove nodes that rewiring left without a reader."""
        dead_before = {id(self.nodes[i]) for i in dead_nodes(self.graph.model.graph.node, self.graph.outputs)}
        ordered = [n for i, node in enumerate(self.nodes) for n in (*self.inserted.get(i, ()), node)]
        dead = {id(ordered[i]) for i in dead_nodes(ordered, self.graph.outputs)} - dead_before
        if dead:
            gone = {name for node in ordered if id(node) in dead for name in node.output}
            for info in [i for i in self.model.graph.value_info if i.name in gone]:
                self.model.graph.value_info.remove(info)
        if dead or self.inserted:
            alive = [_copied(n) for n in ordered if id(n) not in dead]
            del self.model.graph.node[:]
            self.model.graph.node.extend(alive)
        self._store_initializers()


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, Slices) or isinstance(b, Slices):
        return isinstance(a, Slices) and isinstance(b, Slices) and a.same(b)
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy the model without its initializers."""
    copy = ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(copy, field, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(copy.graph, field, value)
    return copy


def _copy_field(target: Any, field: Any, value: Any) -> None:
    if field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED:
        getattr(target, field.name).extend(value)
    elif field.message_type is not None:
        getattr(target, field.name).CopyFrom(value)
    else:
        setattr(target, field.name, value)


def _copied(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _set_attribute(node: NodeProto, name: str, value: Any) -> None:
    new = helper.make_attribute(name, value)
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.CopyFrom(new)
            return
    node.attribute.append(new)
