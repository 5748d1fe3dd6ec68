"""From a TensorFlow function to ONNX through tf2onnx, with five habits of it mended.

1. It freezes variables first, so that TensorFlow folds Conv and BatchNormalization. Here weights stay opaque while
   TensorFlow optimises (:func:`freeze`), BatchNormalization becomes one operator before it does, and tf2onnx' own
   merging of Conv and BatchNormalization is left out.
2. It permutes, splits and joins weights and loses their names. Here the graph is converted a second time with every
   weight's elements replaced by their own numbers, and each initializer tells from what it was made
   (:func:`name_initializers`). No two weights are confused, be their values equal or not.
3. It merges constants of equal value. Here it merges operators only.
4. It has no handler for ``Erfc``, of which the exact GELU is made, leaves unknown operators in the graph, and orders
   operators differently from run to run.
5. It makes a Loop of a GRU of Keras 3. Here recurrent layers become nodes (:mod:`spa.importers._recurrent`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableSet, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from spa.coupling.analysis import TIED
from spa.errors import ModelError, UnsupportedError
from spa.frameworks.keras import fresh
from spa.frameworks.reasons import first_line
from spa.frameworks.tensorflow import Function
from spa.importers._batch_normalisation import join_batch_normalisations
from spa.importers._recurrent import Cell, find_cells, replace_loops

REMEDY = "Replace that part of the model by layers that it converts, or try another opset."
# The bits of 40009.3, number 0: any arithmetic changes a number that large, and constants are seldom near it.
FIRST_TAG = 0x471C494D


# -- freezing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """A graph in which weights are placeholders, as TensorFlow optimises it.

    Attributes:
        graph: the GraphDef.
        weights: (path, Const node) by the placeholder's name.
        inputs: tensor names.
        outputs: tensor names.
        cells: its loops that are recurrent cells, by name.
    """

    graph: Any
    weights: Mapping[str, tuple[str, Any]]
    inputs: list[str]
    outputs: list[str]
    cells: Mapping[str, Cell]

    def spans(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of each weight's elements: the first, and one after the last."""
        spans, first = {}, 0
        for path, const in self.weights.values():
            last = first + math.prod(d.size for d in const.attr["value"].tensor.tensor_shape.dim)
            spans[path], first = (first, last), last
        return spans

    def values(self, numbered: bool) -> np.ndarray:
        """Return all elements in the order of their numbers, or the numbers themselves as tensors hold them."""
        import tensorflow as tf

        if numbered:
            return (np.arange(self.size, dtype=np.uint32) + np.uint32(FIRST_TAG)).view(np.float32)
        arrays = [tf.make_ndarray(const.attr["value"].tensor).ravel() for _, const in self.weights.values()]
        return np.concatenate([*arrays, np.empty(0, np.float32)])

    @property
    def size(self) -> int:
        """The number of elements."""
        return max((last for _, last in self.spans().values()), default=0)

    def filled(self, numbered: bool) -> Any:
        """Return the graph with its weights, or with a number for each of their elements."""
        import tensorflow as tf

        graph, spans, tags = tf.compat.v1.GraphDef(), self.spans(), self.values(True) if numbered else np.empty(0)
        graph.CopyFrom(self.graph)
        for node in graph.node:
            if node.name in self.weights:
                path, const = self.weights[node.name]
                node.CopyFrom(const)
                if numbered:
                    shape = [d.size for d in const.attr["value"].tensor.tensor_shape.dim]
                    own = tags[slice(*spans[path])].reshape(shape)
                    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(own))
        return graph


def freeze(function: Function) -> Frozen:
    """Trace a function and have TensorFlow optimise what lies between its weights.

    Raises:
        ModelError: TensorFlow cannot trace it.
    """
    import tensorflow as tf
    from tf2onnx import tf_loader

    try:
        traced = tf.function(function.call, autograph=False).get_concrete_function(*function.specs)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow cannot trace the model: {first_line(error)} Check example_inputs.") from error
    handles = {id(v.handle): path for path, v in function.variables.items()}
    paths = {own.op.name: handles[id(outer)] for outer, own in traced.graph.captures if id(outer) in handles}
    graph, inputs = _with_constants(traced)
    outputs = [t.name for t in traced.outputs]
    graph = _inlined(tf, tf_loader.fix_freezing_errors_part2(graph), outputs)
    if not function.variables:
        paths = {n.name: n.name for n in graph.node if _is_weight(tf, n)}
    weights = {n.name: (paths[n.name], _copy(tf, n)) for n in graph.node if n.op == "Const" and n.name in paths}
    for node in graph.node:
        if node.name in weights:
            _make_placeholder(node)
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
        replaced = join_batch_normalisations(whole, weights)
        outputs = [replaced.get(name, name) for name in outputs]
        optimised = tf_loader.tf_optimize(inputs, outputs, whole.as_graph_def())
    shapes = {n: tuple(d.size for d in c.attr["value"].tensor.tensor_shape.dim) for n, (_, c) in weights.items()}
    return Frozen(optimised, weights, inputs, outputs, find_cells(optimised, shapes))


def _with_constants(traced: Any) -> tuple[Any, list[str]]:
    """Return the graph of a concrete function with constants for variables, and the names of the inputs that it keeps.

    ``convert_variables_to_constants_v2`` without its last step, which fails where a variable is assigned to, as Keras'
    recurrent layers do when they count the seeds of dropout. Nobody reads what is assigned.
    """
    from tensorflow.python.framework import convert_to_constants

    data = convert_to_constants._FunctionConverterDataInEager(
        func=traced, lower_control_flow=False, aggressive_inlining=True
    )
    graph, converted = convert_to_constants._replace_variables_by_constants(data)
    captures = traced.graph.internal_captures
    constants = {captures[i].name for i in converted}
    assignments = {n.name for n in graph.node if n.op.startswith("Assign") and n.op.endswith("VariableOp")}
    for at in reversed(range(len(graph.node))):
        node = graph.node[at]
        node.input[:] = [name for name in node.input if name.removeprefix("^") not in assignments]
        if node.name in assignments:
            del graph.node[at]
    return graph, [t.name for t in traced.inputs if t.name not in constants]


def _inlined(tf: Any, graph: Any, outputs: Sequence[str]) -> Any:
    """Inline functions that are marked for XLA, as Keras' grouped convolutions are."""
    from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
    from tensorflow.python.grappler import tf_optimizer

    calls = [call for call in (*graph.node, *graph.library.function) if "_XlaMustCompile" in call.attr]
    if not calls:
        return graph
    for call in calls:
        del call.attr["_XlaMustCompile"]
    with tf.Graph().as_default():
        tf.import_graph_def(graph, name="")
        meta = tf.compat.v1.train.export_meta_graph(graph_def=graph)
    meta.collection_def["train_op"].node_list.value.extend(outputs)
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.function_optimization = RewriterConfig.AGGRESSIVE
    config.graph_options.rewrite_options.optimizers.append("function")
    return tf_optimizer.OptimizeGraph(config, meta)


def _is_weight(tf: Any, node: Any) -> bool:
    if node.op != "Const":
        return False
    tensor = node.attr["value"].tensor
    return bool(tensor.dtype == tf.float32.as_datatype_enum and tensor.tensor_shape.dim)


def _copy(tf: Any, node: Any) -> Any:
    copy = tf.compat.v1.NodeDef()
    copy.CopyFrom(node)
    return copy


def _make_placeholder(node: Any) -> None:
    tensor = node.attr["value"].tensor
    kind, shape = tensor.dtype, tensor.tensor_shape
    node.op = "Placeholder"
    node.attr["shape"].shape.CopyFrom(shape)
    node.attr["dtype"].type = kind
    del node.attr["value"]


# -- tf2onnx ---------------------------------------------------------------------------------------------------------


def to_onnx(opset: int, frozen: Frozen | None = None, numbered: bool = False, **options: Any) -> ModelProto:
    """Run tf2onnx.

    Args:
        opset: of the ONNX model.
        frozen: the graph to convert.
        numbered: whether its weights are replaced by numbers.
        options: of ``tf2onnx.tfonnx.process_tf_graph``, where there is no graph.

    Raises:
        UnsupportedError: it fails, or does not know an operator.
    """
    import tensorflow as tf
    from tf2onnx import optimizer, tfonnx, utils

    utils.INTERNAL_NAME = 1  # the counter behind its names: the same model shall give the same bytes
    cells = {} if frozen is None else frozen.cells
    with _quiet(), _ordered_sets(), _known(cells), tf.Graph().as_default() as graph, tf.device("/cpu:0"):
        if frozen is not None:
            tf.import_graph_def(frozen.filled(numbered), name="")
            options = {"input_names": frozen.inputs, "output_names": frozen.outputs}
        try:
            converted = tfonnx.process_tf_graph(graph, opset=opset, custom_op_handlers={"Erfc": (_erfc, [])}, **options)
            converted = optimizer.optimize_graph(converted, catch_errors=False, optimizers=_optimisers())
        except Exception as error:  # its handlers raise anything
            raise UnsupportedError(f"tf2onnx refuses the model: {first_line(error)} {REMEDY}") from error
        model = converted.make_model("tf2onnx")
    _check_operators(model, opset)
    return model


def _check_operators(model: ModelProto, opset: int) -> None:
    """Raise for operators that tf2onnx does not know and leaves in the graph."""
    unknown: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset):
            unknown.setdefault(node.op_type, []).append(node.name)
    if unknown:
        listed = ", ".join(f"{op} ({names[0]!r}, {len(names)} in all)" for op, names in unknown.items())
        raise UnsupportedError(f"tf2onnx has no handler for {listed}. {REMEDY}")


def _erfc(context: Any, node: Any, name: str, args: Any) -> None:
    """Write Erfc(x) as 1 - Erf(x)."""
    from tf2onnx.utils import make_name, map_onnx_to_numpy_type

    node.type = "Erf"
    kind = map_onnx_to_numpy_type(context.get_dtype(node.input[0]))
    one = context.make_const(make_name(name), np.ones((), kind)).output[0]
    rest = context.insert_new_node_on_output("Sub", node.output[0], name=make_name(name))
    context.replace_inputs(rest, [one, node.output[0]])


def _optimisers() -> OrderedDict[str, Any]:
    """Return tf2onnx' optimisers, changed to keep Conv and BatchNormalization apart, equal constants, and Einsum."""
    from tf2onnx import optimizer
    from tf2onnx.optimizer import back_to_back_optimizer, merge_duplicated_nodes_optimizer

    class Nodes(merge_duplicated_nodes_optimizer.MergeDuplicatedNodesOptimizer):
        @staticmethod
        def _skip_node_type(node: Any) -> bool:
            skipped = merge_duplicated_nodes_optimizer.MergeDuplicatedNodesOptimizer._skip_node_type(node)
            return bool(node.is_const() or skipped)

    class BackToBack(back_to_back_optimizer.BackToBackOptimizer):
        def _optimize_at_current_graph_level(self, graph: Any) -> Any:
            rewrites = back_to_back_optimizer._func_map
            merging = rewrites.pop(("Conv", "BatchNormalization"))
            try:
                return super()._optimize_at_current_graph_level(graph)
            finally:
                rewrites[("Conv", "BatchNormalization")] = merging

    chosen = OrderedDict(optimizer._get_optimizers())
    chosen |= {"merge_duplication": Nodes, "remove_back_to_back": BackToBack}
    del chosen["einsum_optimizer"]
    return chosen


class _OrderedSet(MutableSet[Any]):
    """A set that iterates in the order of insertion."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = dict.fromkeys(items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, value: Any) -> None:
        self._items[value] = None

    def discard(self, value: Any) -> None:
        self._items.pop(value, None)

    def union(self, other: Iterable[Any]) -> _OrderedSet:
        return _OrderedSet([*self, *other])

    def issubset(self, other: Iterable[Any]) -> bool:
        return all(item in other for item in self)


@contextlib.contextmanager
def _ordered_sets() -> Iterator[None]:
    """Have tf2onnx iterate in one order, not in that of hashes, on which its choices of transpositions depend."""
    from tf2onnx import graph
    from tf2onnx.optimizer import back_to_back_optimizer, transpose_optimizer

    modules = (graph, back_to_back_optimizer, transpose_optimizer)
    for module in modules:
        module.set = _OrderedSet
    try:
        yield
    finally:
        for module in modules:
            del module.set


@contextlib.contextmanager
def _known(cells: Mapping[str, Cell]) -> Iterator[None]:
    """Have tf2onnx write recurrent nodes for these loops, before it looks for those of Keras 2."""
    from tf2onnx import tfonnx

    original = tfonnx.rewriter_lstm_tf2
    tfonnx.rewriter_lstm_tf2 = lambda graph, ops: original(graph, replace_loops(cells, graph, ops))
    try:
        yield
    finally:
        tfonnx.rewriter_lstm_tf2 = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence tf2onnx' log: what matters in it is raised."""
    logger = logging.getLogger("tf2onnx")
    level, disabled = logger.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)


# -- names -----------------------------------------------------------------------------------------------------------


def numbers_of(tensor: TensorProto, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each element of a numbered model's tensor comes from.

    Args:
        tensor: the tensor.
        size: how many numbers there are.

    Returns:
        The number, int64, or -1 for constants; and the sign that it was given, 1 or -1, float32.
    """
    array = numpy_helper.to_array(tensor)
    if array.dtype != np.float32:
        return np.full(array.shape, -1), np.ones(array.shape, np.float32)
    bits = np.abs(array).view(np.uint32).astype(np.int64) - FIRST_TAG
    return np.where((bits >= 0) & (bits < size), bits, -1), np.where(array < 0, -1, 1).astype(np.float32)


def weights_left(numbered: ModelProto, frozen: Frozen) -> set[str]:
    """Return the paths of the weights that are found in a numbered model, alone or joined with others."""
    numbers = [numbers_of(t, frozen.size)[0].ravel() for t in numbered.graph.initializer]
    left = np.unique(np.concatenate([np.empty(0, np.int64), *numbers]))
    return {path for path, span in frozen.spans().items() if np.diff(np.searchsorted(left, span)) > 0}


def name_initializers(model: ModelProto, numbered: ModelProto, frozen: Frozen) -> dict[str, str]:
    """Name each initializer after the weight that it was made from, in place; return the weights' paths by name.

    Those that were made from one weight in the same way become one. Those that several operators read are marked as
    tied: tf2onnx merged nothing, so they are one weight of one layer.

    Args:
        model: the model to change.
        numbered: the same with numbers for weights; it may be the same message.
        frozen: where both came from.

    Returns:
        Nothing where the two graphs differ.
    """
    pairs = _pairs(model, numbered)
    spans = frozen.spans()
    starts, paths = np.array([first for first, _ in spans.values()]), list(spans)
    tensors = {t.name: t for t in numbered.graph.initializer}
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values = frozen.values(numbered is model)
    taken = {o for n in model.graph.node for o in n.output} | {v.name for v in model.graph.input}
    renamed: dict[str, str] = {}
    names: dict[str, str] = {}
    made: dict[tuple[Any, ...], str] = {}  # by shape and sources, of which none is a constant
    for own, other in pairs.items():
        numbers, sign = numbers_of(tensors[other], frozen.size)
        elements = numbers[numbers >= 0]
        if elements.size and np.array_equal(weights[own][numbers >= 0], (values[numbers] * sign)[numbers >= 0]):
            path = paths[int(np.searchsorted(starts, elements[0], side="right")) - 1]
            name = fresh(path, taken | names.keys())
            if elements.size == numbers.size:
                name = made.setdefault((numbers.shape, numbers.tobytes(), sign.tobytes()), name)
            renamed[own] = name
            names[name] = path
    rename(model, renamed)
    single = {t.name: t for t in model.graph.initializer}
    del model.graph.initializer[:]
    model.graph.initializer.extend(single.values())
    readers = Counter(name for node in model.graph.node for name in set(node.input))
    for tensor in model.graph.initializer:
        if tensor.name in names and readers[tensor.name] > 1:
            tensor.metadata_props.add(key=TIED, value="true")
    return names


def _pairs(model: ModelProto, other: ModelProto) -> dict[str, str]:
    """Pair initializers of two graphs with the same operators, in the order of use; none where the graphs differ."""
    weights = {t.name for t in model.graph.initializer}
    if [n.op_type for n in model.graph.node] != [n.op_type for n in other.graph.node]:
        return {}
    pairs: dict[str, str] = {}
    for mine, theirs in zip(model.graph.node, other.graph.node, strict=True):
        for a, b in zip(mine.input, theirs.input, strict=True):
            if a in weights:
                pairs.setdefault(a, b)
    return pairs


def rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename tensors everywhere in a model, subgraphs included."""

    def within(graph: GraphProto) -> None:
        for tensor in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            tensor.name = names.get(tensor.name, tensor.name)
        for node in graph.node:
            node.input[:] = [names.get(i, i) for i in node.input]
            node.output[:] = [names.get(o, o) for o in node.output]
            for attribute in node.attribute:
                for sub in (attribute.g, *attribute.graphs):
                    within(sub)

    within(model.graph)
