"""Fold the scale and the shift that stand for a detour into the layer before or after, where that changes nothing.

Cases, for ``y = a x + b`` with a number each per channel:

1. x comes from a Conv, a Gemm, a MatMul or a BatchNormalization, and nothing else reads it: a goes into the weights, b
   into the bias. A MatMul has none, and the Add stays.
2. y goes into one Conv that does not pad, or a Gemm, and nowhere else: a goes into its weights, b into its bias.

Everywhere else both stay.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from spa.model.graph import Graph, Node, names_read, replace_nodes
from spa.model.traits import NUMPY_FLOATS

Array = np.ndarray
UNPADDED = ("NOTSET", "VALID")


def fold_scale(pruned: ModelProto, graph: Graph, node: Node, axis: int, rank: int, outside: Collection[str]) -> None:
    """Fold what stands for a detour, in place.

    Args:
        pruned: the pruned and repaired network.
        graph: its view.
        node: the Add that the detour ends in now.
        axis: of the channels.
        rank: of the tensors.
        outside: initializers without data, which stay as they are.
    """
    _Scale(pruned, graph, node, axis, rank, outside).fold()


class _Scale:
    """A scale and a shift, and the layers beside them."""

    def __init__(
        self, pruned: ModelProto, graph: Graph, node: Node, axis: int, rank: int, outside: Collection[str]
    ) -> None:
        self.pruned, self.graph, self.axis, self.rank, self.outside = pruned, graph, axis, rank, outside
        self.add, self.mul = node, graph.producer[node.inputs[0]]
        self.source, self.target = self.mul.inputs[0], node.outputs[0]
        self.scale, self.shift = graph.array(self.mul.inputs[1]), graph.array(node.inputs[1])

    def fold(self) -> None:
        """Fold both, one, or none."""
        maker = self.graph.producer.get(self.source)
        alone = maker is not None and self._is_read_once(self.source) and self._has_free_bias(maker)
        if maker is not None and alone and self._weigh(maker, self._rows(maker)):  # Case 1
            self._rewire(shifted=self._shift_maker(maker))
            return
        users = self.graph.users.get(self.target, ())
        if len(users) == 1 and users[0][1] == 0 and self._is_read_once(self.target):  # Case 2
            self._into(users[0][0])

    def _into(self, reader: Node) -> None:
        """Fold both into the layer after, or none."""
        columns = self._columns(reader)
        if not columns or self._own(reader, 1) is None:
            return
        change = self._given(reader)
        if change is not None and self._can_shift(reader, change) and self._weigh(reader, columns):
            if len(reader.inputs) < 3 or not reader.inputs[2]:
                shifted = self._give_bias(reader, change)
            else:
                shifted = self._move(reader, change)
            self._rewire(shifted)

    # -- weights -------------------------------------------------------------------------------------------------

    def _rows(self, node: Node) -> tuple[tuple[int, int], ...]:
        """Return (operand, axis) of the weights of a node by the channel that they make; none where it is no layer."""
        if node.domain or len(node.outputs) > 1:
            return ()
        last = self.axis == self.rank - 1
        match node.op:
            case "Conv":
                return ((1, 0),) if self.axis == 1 else ()
            case "BatchNormalization":
                return ((1, 0),) if self.axis == 1 else ()
            case "Gemm":
                return ((1, 0 if node.attributes.get("transB", 0) else 1),) if last else ()
            case "MatMul":
                return ((1, 1),) if last else ()
        return ()

    def _columns(self, node: Node) -> tuple[tuple[int, int], ...]:
        """Return (operand, axis) of the weights of a node by the channel that they read."""
        last = self.axis == self.rank - 1
        if node.domain:
            return ()
        match node.op:
            case "Conv":
                one_each = node.attributes.get("group", 1) == self.scale.size
                whole = node.attributes.get("group", 1) == 1
                return ((1, 0 if one_each else 1),) if self.axis == 1 and (one_each or whole) else ()
            case "Gemm" if not node.attributes.get("transA", 0):
                return ((1, 1 if node.attributes.get("transB", 0) else 0),) if last else ()
        return ()

    def _weigh(self, node: Node, places: tuple[tuple[int, int], ...]) -> bool:
        """Scale weights; return False where they are none of floats that this node alone reads."""
        tensors = [(self._own(node, operand), axis) for operand, axis in places]
        if not tensors or any(t is None or len(t.dims) <= axis for t, axis in tensors):
            return False
        for tensor, axis in tensors:
            assert tensor is not None
            old = self.graph.array(tensor.name)
            if old.shape[axis] not in (self.scale.size, 1) or (node.op == "MatMul" and old.ndim != 2):
                return False
            along = [1] * old.ndim
            along[axis] = -1
            self._store(tensor, old * self.scale.reshape(along))
        return True

    def _has_free_bias(self, maker: Node) -> bool:
        """Return whether the bias of the layer before, where it has one, is its own and one number per channel."""
        if len(maker.inputs) < 3 or not maker.inputs[2]:
            return True
        tensor = self._own(maker, 2)
        return tensor is not None and self.graph.array(tensor.name).shape == (self.scale.size,)

    def _shift_maker(self, maker: Node) -> bool:
        """Scale and shift the bias of the layer before; return False where it can have none."""
        if maker.op == "MatMul" or (maker.op == "Gemm" and maker.attributes.get("beta", 1.0) != 1.0):
            return False
        shift = self.shift.reshape(-1)
        if len(maker.inputs) < 3 or not maker.inputs[2]:
            return self._give_bias(maker, shift)
        old = self.graph.array(maker.inputs[2])
        self._store(self.graph.initializers[maker.inputs[2]], old * self.scale.reshape(-1) + shift)
        return True

    def _given(self, reader: Node) -> Array | None:
        """Return what the shift adds to each output of the layer after; None where it differs from place to place."""
        padded = any(reader.attributes.get("pads", ())) or reader.attributes.get("auto_pad", "NOTSET") not in UNPADDED
        weights, shift = self.graph.array(reader.inputs[1]).astype(np.float64), self.shift.reshape(-1)
        if reader.op == "Conv":
            taps = weights.reshape(*weights.shape[:2], -1).sum(axis=2)
            return None if padded else taps[:, 0] * shift if taps.shape[1] == 1 < shift.size else taps @ shift
        matrix = weights if reader.attributes.get("transB", 0) else weights.T
        return np.asarray(reader.attributes.get("alpha", 1.0) * (matrix @ shift)) if weights.ndim == 2 else None

    def _can_shift(self, reader: Node, change: Array) -> bool:
        """Return whether the layer after has, or can be given, a bias that takes the shift over."""
        if reader.op == "Gemm" and reader.attributes.get("beta", 1.0) != 1.0:
            return False
        if len(reader.inputs) < 3 or not reader.inputs[2]:
            return True
        tensor = self._own(reader, 2)
        return tensor is not None and self.graph.array(tensor.name).size == change.size

    def _move(self, reader: Node, change: Array) -> bool:
        old = self.graph.array(reader.inputs[2])
        self._store(self.graph.initializers[reader.inputs[2]], old + change.reshape(old.shape))
        return True

    def _give_bias(self, node: Node, bias: Array) -> bool:
        """Give a layer a bias under the name of the shift."""
        name = self.add.inputs[1]
        self._store(self.graph.initializers[name], bias)
        inputs = [*node.proto.input[:2], name]
        del node.proto.input[:]
        node.proto.input.extend(inputs)
        return True

    # -- the graph -----------------------------------------------------------------------------------------------

    def _own(self, node: Node, operand: int) -> TensorProto | None:
        """Return an initializer of floats that one node alone reads, or None."""
        name = node.inputs[operand] if len(node.inputs) > operand else ""
        tensor = self.graph.initializers.get(name)
        alone = len(self.graph.users.get(name, ())) == 1 and name not in self.graph.outputs
        captured = any(name in names for names in self.graph.captured.values())
        if tensor is None or name in self.outside or not alone or captured or tensor.data_type not in NUMPY_FLOATS:
            return None
        return tensor

    def _store(self, tensor: TensorProto, value: Array) -> None:
        dtype = self.graph.array(tensor.name).dtype
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value).astype(dtype), tensor.name))
        self.graph.forget(tensor.name)

    def _is_read_once(self, name: str) -> bool:
        captured = any(name in names for names in self.graph.captured.values())
        return len(self.graph.users.get(name, ())) == 1 and name not in self.graph.outputs and not captured

    def _rewire(self, shifted: bool) -> None:
        """Take the Mul out, and the Add where its constant has gone elsewhere."""
        model = self.pruned.graph
        gone = {self.mul.index, self.add.index} if shifted else {self.mul.index}
        if shifted:
            for user, operand in self.graph.users.get(self.target, ()):
                user.proto.input[operand] = self.source
        else:
            self.add.proto.input[0] = self.source
        replace_nodes(model, [n for i, n in enumerate(model.node) if i not in gone])
        names = {self.mul.outputs[0], *([self.target] if shifted else [])}
        for info in [i for i in model.value_info if i.name in names]:
            model.value_info.remove(info)
        used = names_read(model)
        stand_ins = {self.mul.inputs[1], self.add.inputs[1]}
        for tensor in [t for t in model.initializer if t.name in stand_ins and t.name not in used]:
            model.initializer.remove(tensor)
