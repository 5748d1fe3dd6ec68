"""Bodies of Loop, Scan and If, laid flat for everything that reads a graph, and put together again to be run.

A body is a graph of its own, in which weights can be pruned like any others. In the flat form its nodes lie in the
main graph, between two marks::

    h = Loop(n, go, h0) {s -> tanh(s w)}    becomes    i, c, s, steps = LoopEnter(n, go, h0)
                                                       o = Tanh(MatMul(s, w))
                                                       h = LoopLeave(c, o, s, steps)

``LoopEnter`` gives what the body is given at each step, and ``steps``, an axis as long as there are steps;
``LoopLeave`` says that what a state becomes is what it was. The two branches of an If follow each other, between
``IfThen``, ``IfElse`` and ``IfLeave``. Weights of bodies become initializers of the main graph, and stay that.
:func:`nested` is the way back; tensors inside a body that it makes outputs hold all steps, as so many samples.

Left as they are: bodies of other shapes at other steps, of sequences and optionals, with sparse initializers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.errors import ModelError, SpaError
from spa.model.branches import definitions, rename
from spa.model.graph import Graph, domain_of, names_read, replace_nodes, subgraphs_of, tensor_array
from spa.model.marks import ENTER, FLAT, LEAVE, is_flat
from spa.model.two_points import TwoPoints, two_points
from spa.model.versions import FREE_INITIALIZERS

KINDS = ("Loop", "Scan", "If")
FIRST_SCAN = 9  # the version of Scan whose operands have no batch
KEY = "key"  # the attribute of a closing mark that tells its node from others of the model
ORIGINAL = "original"  # the attribute of a closing mark that holds the node without its bodies' nodes
INSIDE = "@step"  # the ending of a tensor's name inside a body where all of its steps bear the name outside


def flattened(model: ModelProto, base: Path | None = None) -> ModelProto | None:
    """Return a copy of a model whose bodies lie flat; None where there is none that can.

    Args:
        model: simplified, which is not changed.
        base: the folder of its external data.
    """
    if model.ir_version < FREE_INITIALIZERS or not any(n.op_type in KINDS for n in model.graph.node):
        return None
    refused: set[str] = set()
    for kinds in (KINDS, KINDS[:2]):  # branches may contradict themselves at the sizes of the analysis
        while (flat := _laid_flat(model, kinds, refused)) is not None:
            graph = Graph(flat, base)
            try:
                wrong = _unsteady(graph, two_points(graph))
            except SpaError:
                break
            if not wrong:
                return flat
            refused |= wrong
    return None


# -- laying flat ----------------------------------------------------------------------------------------------------


def _laid_flat(model: ModelProto, kinds: Collection[str], refused: Collection[str]) -> ModelProto | None:
    """Lay bodies flat, outer ones first; None where there is nothing to do."""
    flat = ModelProto()
    flat.CopyFrom(model)
    graph, version = flat.graph, _version(model)
    found = 0
    while True:
        chosen = {
            i
            for i, n in enumerate(graph.node)
            if n.op_type in kinds and _is_plain(n, version) and _key(n) not in refused
        }
        if not chosen:
            break
        found += len(chosen)
        taken, read = Counter(definitions(graph)), names_read(graph)
        nodes: list[NodeProto] = []
        for i, node in enumerate(graph.node):
            nodes += _marked(node, read, graph, taken) if i in chosen else [node]
        replace_nodes(graph, nodes)
    if not found:
        return None
    if not is_flat(flat):
        flat.opset_import.append(helper.make_opsetid(FLAT, 1))
    return flat


def _version(model: ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def _key(node: NodeProto) -> str:
    """Return what tells a node from others of the model: an output of its own."""
    return next((name for name in node.output if name), "")


def _is_plain(node: NodeProto, version: int) -> bool:
    """Return whether bodies hold what the flat form can express, as many inputs and outputs as they must have."""
    bodies = subgraphs_of(node)
    if domain_of(node) or not _key(node) or any(g.sparse_initializer for g in bodies):
        return False
    if node.op_type == "If":
        return len(bodies) == 2 and all(len(g.output) == len(node.output) and not g.input for g in bodies)
    if len(bodies) != 1:
        return False
    (body,) = bodies
    if node.op_type == "Loop":
        states = len(node.input) - 2
        return states >= 0 and len(body.input) == states + 2 and len(body.output) == len(node.output) + 1 > states
    scanned = _attribute(node, "num_scan_inputs", 0)
    given = version >= FIRST_SCAN and 0 < scanned <= len(node.input)
    return given and len(body.input) == len(node.input) and len(body.output) == len(node.output)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _capturing(node: NodeProto, read: Collection[str]) -> tuple[NodeProto, list[NodeProto]]:
    """Let a body read from outside what it only hands on from step to step, as TensorFlow hands on weights.

    Args:
        node: the node.
        read: what the graph around it reads.

    Returns:
        The node without these states, and what computes its results that they were.
    """
    if node.op_type == "If":
        return node, []
    (body,), loop = subgraphs_of(node), node.op_type == "Loop"
    states = len(node.input) - (2 if loop else _attribute(node, "num_scan_inputs", 0))
    made = {o: n for n in body.node for o in n.output if n.op_type == "Identity"}
    inner = set(definitions(body))

    def is_handed_on(place: int) -> bool:
        name = body.output[place + loop].name
        while name in made:
            name = made[name].input[0]
        given = node.input[place + 2 * loop]
        return name == body.input[place + 2 * loop].name and bool(given) and given not in inner

    places = [place for place in range(states) if is_handed_on(place)][: len(node.output) - 1]
    if not places:
        return node, []
    copy = NodeProto()
    copy.CopyFrom(node)
    (body,) = subgraphs_of(copy)
    names = {body.input[place + 2 * loop].name: node.input[place + 2 * loop] for place in places}
    for other in body.node:
        rename(other, partial(_looked_up, names))
    for place in reversed(places):
        del copy.input[place + 2 * loop], copy.output[place]
        del body.input[place + 2 * loop], body.output[place + loop]
    for output in body.output:
        output.name = _looked_up(names, output.name)
    for copied in reversed(list(body.node)):  # a weight that is copied and not read would be cut for itself
        if copied.op_type == "Identity" and copied.output[0] not in names_read(body):
            body.node.remove(copied)
    results = ((node.input[place + 2 * loop], node.output[place]) for place in places)
    return copy, [helper.make_node("Identity", [given], [result]) for given, result in results if result in read]


def _marked(node: NodeProto, read: Collection[str], graph: GraphProto, taken: Counter[str]) -> list[NodeProto]:
    """Return a node's bodies between marks, and move their weights and declarations into the main graph.

    Args:
        node: the node.
        read: what the main graph reads.
        graph: the main graph.
        taken: how often each name of the model is defined.
    """
    key = _key(node)
    node, after = _capturing(node, read)
    make = partial(helper.make_node, domain=FLAT)
    label, kind = node.name or _key(node), node.op_type
    steps = _unique(f"{label}/steps", taken)
    original = _without_bodies(node)
    if kind == "If":
        orelse = _unique(f"{label}/else", taken)
        first, second = (
            _moved(next(a.g for a in node.attribute if a.name == name), graph, taken)
            for name in ("then_branch", "else_branch")
        )
        leave = make("IfLeave", [node.input[0], *first.outputs, *second.outputs, steps, orelse], node.output)
        leave.name = node.name
        leave.attribute.extend([helper.make_attribute(ORIGINAL, original), helper.make_attribute(KEY, key)])
        opening, between = make("IfThen", [node.input[0]], [steps]), make("IfElse", [node.input[0]], [orelse])
        return [opening, *first.nodes, between, *second.nodes, leave, *after]
    body = _moved(subgraphs_of(node)[0], graph, taken)
    enter, leave = make(f"{kind}Enter", node.input, [*body.inputs, steps]), make(f"{kind}Leave", [], node.output)
    enter.name, leave.name = f"{label}/begin", node.name
    if kind == "Loop":
        states = len(node.input) - 2
        ranks = [len(i.type.tensor_type.shape.dim) for i in subgraphs_of(node)[0].input[:2]]
        enter.attribute.append(helper.make_attribute("ranks", ranks))
        enter.attribute.append(helper.make_attribute("counted", int(_is_counted(node, body, graph))))
        leave.input.extend([*body.outputs, *body.inputs[2:], steps])
    else:
        states = len(node.input) - _attribute(node, "num_scan_inputs", 0)
        leave.input.extend([*body.outputs, *body.inputs[:states], steps])
        enter.attribute.extend(a for a in node.attribute if a.name in ("num_scan_inputs", "scan_input_axes"))
        leave.attribute.extend(a for a in node.attribute if a.name == "scan_output_axes")
    leave.attribute.append(helper.make_attribute("states", states))
    leave.attribute.extend([helper.make_attribute(ORIGINAL, original), helper.make_attribute(KEY, key)])
    return [enter, *body.nodes, leave, *after]


def _unique(base: str, taken: Counter[str]) -> str:
    name, count = base, 2
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    taken[name] += 1
    return name


def _without_bodies(node: NodeProto) -> bytes:
    copy = NodeProto()
    copy.CopyFrom(node)
    for body in subgraphs_of(copy):
        for part in ("node", "initializer", "value_info"):
            body.ClearField(part)
    return copy.SerializeToString()


@dataclass
class _Body:
    """A body in the main graph: its nodes, and the names there of what it is given and gives."""

    nodes: list[NodeProto]
    inputs: list[str]
    outputs: list[str]


def _moved(body: GraphProto, graph: GraphProto, taken: Counter[str]) -> _Body:
    """Copy a body's nodes under names that nothing else in the model bears, and move all else into the main graph."""
    own = [i.name for i in body.input] + [t.name for t in body.initializer]
    own += [name for node in body.node for name in node.output if name]
    names = {name: name if taken[name] == 1 else _unique(name, taken) for name in own}

    def new(name: str) -> str:
        return names.get(name, name)

    nodes = []
    for node in body.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        rename(copy, new)
        nodes.append(copy)
    for tensor in body.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = new(tensor.name)
    # What a body gives is made by a node of its own, or is what it is given, once.
    passed = {i.name for i in body.input} | {name for node in body.node for name in node.output}
    outputs: list[str] = []
    for info in body.output:
        name = new(info.name)
        if info.name not in passed or name in outputs:
            name = _unique(f"{name}/given", taken)
            nodes.append(helper.make_node("Identity", [new(info.name)], [name]))
        outputs.append(name)
    declared = {i.name for i in graph.value_info} | {i.name for i in graph.output}
    given = dict(zip(outputs, body.output, strict=True)) | {new(i.name): i for i in (*body.input, *body.value_info)}
    for name, info in given.items():
        if name not in declared and info.type.tensor_type.HasField("shape"):
            graph.value_info.add().CopyFrom(info)
            graph.value_info[-1].name = name
    return _Body(nodes, [new(i.name) for i in body.input], outputs)


def _is_counted(node: NodeProto, body: _Body, graph: GraphProto) -> bool:
    """Return whether a loop runs as often as its first operand says: its condition is true to the end."""
    if not node.input[0]:
        return False
    stored = {t.name: t for t in graph.initializer}
    made = {o: n for n in (*graph.node, *body.nodes) for o in n.output}

    def is_true(name: str, given: str | None) -> bool:
        while (maker := made.get(name)) is not None and maker.op_type in ("Identity", "Cast"):
            name = maker.input[0]
        if name == given:
            return True
        tensor = stored.get(name)
        if tensor is None and maker is not None and maker.op_type == "Constant":
            tensor = next((a.t for a in maker.attribute if a.name == "value"), None)
            number = next((a.i for a in maker.attribute if a.name == "value_int"), 0)
            return bool(number) if tensor is None else bool(tensor_array(tensor).all())
        return tensor is not None and tensor.data_type == TensorProto.BOOL and bool(numpy_helper.to_array(tensor).all())

    begins = not node.input[1] or is_true(node.input[1], None)
    return begins and is_true(body.outputs[0], body.inputs[1])


def _unsteady(graph: Graph, points: TwoPoints) -> set[str]:
    """Return the keys of nodes whose states change their shapes from step to step, or whose branches differ in them."""
    wrong: set[str] = set()
    for node in graph.nodes:
        if node.domain != FLAT or node.op not in LEAVE:
            continue
        if node.op == "IfLeave":
            count = len(node.outputs)
            pairs = list(zip(node.inputs[1 : 1 + count], node.inputs[1 + count : 1 + 2 * count], strict=True))
        else:
            states = node.attributes["states"]
            first = int(node.op == "LoopLeave")
            pairs = list(zip(node.inputs[first : first + states], node.inputs[-1 - states : -1], strict=True))
        for walk in points.walks:
            shapes = [(walk.shape.get(a), walk.shape.get(b)) for a, b in pairs]
            if any(a is None or a != b for a, b in shapes):
                wrong.add(node.attributes[KEY])
    return wrong


# -- putting together -----------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """A body that is being put together.

    Attributes:
        enter: the mark that it began with; None for the main graph.
        nodes: its nodes so far.
        before: the nodes of the first branch, in the second.
        inside: what tensors' names end with inside that all steps have outside.
    """

    enter: NodeProto | None
    nodes: list[NodeProto] = field(default_factory=list)
    before: list[NodeProto] = field(default_factory=list)
    inside: str = INSIDE


def nested(model: ModelProto) -> ModelProto:
    """Return a model whose bodies are graphs again; any other model is returned as it is.

    Outputs of the model that lie in a body hold all steps one after the other along their first axis.

    Args:
        model: what :func:`flattened` returned, or a part of it with whole bodies; it is not changed.

    Raises:
        ModelError: a body is cut, or an output lies in a branch.
    """
    if not is_flat(model):
        return model
    whole = ModelProto()
    whole.CopyFrom(model)
    graph = whole.graph
    inputs = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    taps = [o.name for o in graph.output if o.name not in inputs]
    infos = {i.name: i for i in graph.value_info}
    frames = [_Frame(None)]
    for node in model.graph.node:
        if node.domain != FLAT:
            frames[-1].nodes.append(node)
        elif node.op_type in ENTER:
            frames.append(_Frame(node))
        elif node.op_type == "IfElse":
            frames[-1].before, frames[-1].nodes = frames[-1].nodes, []
        else:
            if len(frames) == 1:
                raise _cut(node)
            frame = frames.pop()
            frame.inside = f"{INSIDE}{len(frames)}"
            frames[-1].nodes += _closed(frame, node, infos, taps)
    if len(frames) > 1:
        raise _cut(frames[-1].enter or NodeProto())
    replace_nodes(graph, frames[0].nodes)
    _forget(whole, set(definitions(graph)) - set(_at_home(graph)))
    return whole


def _cut(node: NodeProto) -> ModelError:
    return ModelError(f"{node.op_type} {node.name!r}: a part of a loop's body does not run by itself.")


def _at_home(graph: GraphProto) -> Iterable[str]:
    return [name for node in graph.node for name in node.output]


def _forget(model: ModelProto, inner: set[str]) -> None:
    """Take out of the main graph what is said of bodies' tensors, and the domain of the marks."""
    for items, wrong in (
        (model.graph.value_info, [i for i in model.graph.value_info if i.name in inner]),
        (model.opset_import, [o for o in model.opset_import if o.domain == FLAT]),
    ):
        for item in wrong:
            items.remove(item)


def _closed(frame: _Frame, leave: NodeProto, infos: dict[str, ValueInfoProto], taps: Sequence[str]) -> list[NodeProto]:
    """Return the node that a frame is the body of, and those that line up the steps of tapped tensors."""
    enter = frame.enter
    assert enter is not None  # the main graph has no end
    node = NodeProto()
    node.ParseFromString(next(a.s for a in leave.attribute if a.name == ORIGINAL))
    node.name = leave.name
    node.input[:], node.output[:] = enter.input, leave.output
    made = {name for inner in (*frame.nodes, *frame.before) for name in inner.output} | set(enter.output)
    tapped = [name for name in taps if name in made]
    if leave.op_type == "IfLeave":
        if tapped:
            raise ModelError(f"{node.name!r}: its branch does not always run, so {tapped[0]!r} cannot be observed.")
        count = len(leave.output)
        branches = {"then_branch": (frame.before, 1), "else_branch": (frame.nodes, 1 + count)}
        for attribute in node.attribute:
            if attribute.name in branches:
                nodes, first = branches[attribute.name]
                attribute.g.node.extend(nodes)
                _declare(attribute.g.output, leave.input[first : first + count], infos)
        return [node]
    names = {name: f"{name}{frame.inside}" for name in tapped}
    new = partial(_looked_up, names)
    (body,) = subgraphs_of(node)
    body.node.extend(frame.nodes)
    for inner in body.node:
        rename(inner, new)
    given = [new(name) for name in enter.output[:-1]]
    _declare(body.input, given, infos)
    _declare(body.output, [new(name) for name in leave.input[: len(body.output)]], infos)
    own = {name for inner in body.node for name in inner.output}
    body.value_info.extend(info for name, info in infos.items() if name in own - {o.name for o in body.output})
    return [node, *_lined_up(node, body, names)]


def _looked_up(names: dict[str, str], name: str) -> str:
    return names.get(name, name)


def _declare(places: Iterable[ValueInfoProto], names: Sequence[str], infos: dict[str, ValueInfoProto]) -> None:
    """Give what a body takes or gives its names, and the sizes that are known now; ranks stay."""
    for place, name in zip(places, names, strict=True):
        if name in infos:
            place.type.CopyFrom(infos[name].type)
        else:
            for dim in place.type.tensor_type.shape.dim:
                dim.Clear()
        place.name = name


def _lined_up(node: NodeProto, body: GraphProto, names: dict[str, str]) -> list[NodeProto]:
    """Make tensors of a body outputs of its node, and join their first two axes: steps and samples."""
    nodes: list[NodeProto] = []
    for outside, inside in names.items():
        passed = f"{inside}/passed"  # no input of the body is given as it is
        body.node.append(helper.make_node("Identity", [inside], [passed]))
        body.output.add().name = passed
        steps, shape, rest, joined, minus, two, far = (
            f"{inside}/{part}" for part in ("steps", "shape", "rest", "joined", "minus", "two", "far")
        )
        node.output.append(steps)
        constants = {minus: -1, two: 2, far: 2**31}
        nodes += [helper.make_node("Constant", [], [name], value_ints=[value]) for name, value in constants.items()]
        nodes += [
            helper.make_node("Shape", [steps], [shape]),
            helper.make_node("Slice", [shape, two, far], [rest]),
            helper.make_node("Concat", [minus, rest], [joined], axis=0),
            helper.make_node("Reshape", [steps, joined], [outside]),
        ]
    if node.op_type == "Scan":
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.extend([0] * len(names))
    return nodes
