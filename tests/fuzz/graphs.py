"""Random valid networks: images or rows through random layers, with branches, pieces, sums and shape arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

WIDTHS = (3, 5, 6, 7, 8, 11, 12, 13)
UNARY = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Neg", "Abs", "HardSwish", "Elu", "Identity")


@dataclass
class Net:
    """A network that grows.

    Attributes:
        rng: draws everything.
        nodes: so far, in order.
        weights: so far.
        shapes: of the tensors that further nodes may read; the first axis is the batch, which is open.
        stem: what the names of its tensors begin with.
        bodies: whether there are loops, scans and branches in it.
    """

    rng: random.Random
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stem: str = ""
    bodies: bool = True

    def weight(self, *shape: int, positive: bool = False) -> str:
        draws = np.random.default_rng(self.rng.randrange(2**32)).standard_normal(shape)
        draws = np.abs(draws) + 0.5 if positive else draws / math.sqrt(max(1, math.prod(shape[1:])))
        return self.store(draws.astype(np.float32))

    def store(self, value: object) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, operands: list[str], *shapes: tuple[int, ...], **attributes: object) -> str:
        names = [f"{self.stem}t{len(self.nodes)}_{i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(op, operands, names, name=f"{self.stem}n{len(self.nodes)}", **attributes))
        self.shapes.update(zip(names, shapes, strict=True))
        return names[0]

    def some(self, rank: int | None = None) -> str:
        """Return a tensor, recent ones more often."""
        names = [n for n, s in self.shapes.items() if rank is None or len(s) == rank]
        return names[max(self.rng.randrange(len(names)), self.rng.randrange(len(names)))]


def layer(net: Net, x: str) -> None:
    """Put a layer behind a tensor."""
    rng, shape, width = net.rng, net.shapes[x], net.rng.choice(WIDTHS)
    channels, space = shape[1], shape[2:]
    match rng.randrange(15 if net.bodies else 13):
        case 0 | 1 | 2 if len(shape) == 4:
            group = rng.choice([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0])
            width = channels if group == channels else width * group
            kernel = rng.choice([1, 3])
            operands = [x, net.weight(width, channels // group, kernel, kernel)]
            operands += [net.weight(width)] if rng.random() < 0.5 else []
            net.add("Conv", operands, (0, width, *space), group=group, pads=[kernel // 2] * 4)
        case 0 | 1 if len(shape) == 2:
            net.add("Gemm", [x, net.weight(width, channels), net.weight(width)], (0, width), transB=1)
        case 2:
            last = shape[-1]
            net.add("MatMul", [x, net.weight(last, width)], (*shape[:-1], width))
        case 3:
            scale = [net.weight(channels, positive=True) for _ in range(4)]
            net.add("BatchNormalization", [x, *scale], shape)
        case 4:
            net.add("Mul", [x, net.weight(channels, *[1] * len(space))], shape)
        case 5:
            same = [n for n, s in net.shapes.items() if s == shape]
            net.add(rng.choice(["Add", "Mul", "Max"]), [x, rng.choice(same)], shape)
        case 6:
            like = [n for n, s in net.shapes.items() if s[:1] + s[2:] == shape[:1] + shape[2:]]
            parts = [x, *(rng.choice(like) for _ in range(rng.choice([1, 2])))]
            total = sum(net.shapes[p][1] for p in parts)
            if total <= 64:
                net.add("Concat", parts, (0, total, *space), axis=1)
        case 7 if channels > 2:
            first = rng.randrange(1, channels)
            sizes = net.store(np.asarray([first, channels - first]))
            net.add("Split", [x, sizes], (0, first, *space), (0, channels - first, *space), axis=1)
        case 8 if len(shape) == 4:
            if rng.random() < 0.5:
                net.add("GlobalAveragePool", [x], (0, channels, 1, 1))
            else:
                net.add("Flatten", [x], (0, math.prod(shape[1:])))
        case 9 if len(shape) == 4 and channels % 2 == 0:
            net.add(
                "Reshape",
                [x, net.store(np.asarray([0, 2, channels // 2, -1]))],
                (0, 2, channels // 2, math.prod(space)),
            )
        case 10 if len(shape) == 4:
            order = rng.choice([[0, 2, 1, 3], [0, 1, 3, 2], [0, 3, 1, 2]])
            net.add("Transpose", [x], tuple(shape[i] for i in order), perm=order)
        case 11:
            places = rng.sample(range(channels), rng.randrange(1, channels + 1))
            net.add("Gather", [x, net.store(np.asarray(places))], (0, len(places), *space), axis=1)
        case 13 | 14 if net.stem.count("b") < 2:
            rng.choice([loop, scan, choice])(net, x)
        case _:
            net.add(rng.choice(UNARY), [x], shape)


# -- bodies ----------------------------------------------------------------------------------------------------------


def inside(net: Net, given: dict[str, tuple[int, ...]], read: Sequence[str] = (), stem: str = "") -> Net:
    """Return a body of a few layers, which may read some of what is around it."""
    around = [*read, *net.rng.sample(sorted(net.shapes), net.rng.randrange(min(3, len(net.shapes)) + 1))]
    stem = f"{net.stem}b{len(net.nodes)}{stem}"
    shapes = {f"{stem}{name}": shape for name, shape in given.items()} | {name: net.shapes[name] for name in around}
    body = Net(net.rng, [], net.weights, shapes, stem)
    for _ in range(net.rng.randrange(1, 4)):
        layer(body, body.some())
    return body


def back(body: Net, shape: tuple[int, ...]) -> str:
    """Bring something that a body has made to a shape, or make something of that shape."""
    wide = [n for n, s in body.shapes.items() if s[:-1] == shape[:-1] and s[-1] != shape[-1]]
    same = [n for n, s in body.shapes.items() if s == shape]
    if wide and (not same or body.rng.random() < 0.5):
        name = body.rng.choice(wide[-3:])
        return body.add("MatMul", [name, body.weight(body.shapes[name][-1], shape[-1])], shape)
    return body.add("Mul", [body.rng.choice(same[-3:]), body.weight(shape[-1])], shape)


def declared(name: str, shape: tuple[int, ...], open_first: bool = True) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N" if open_first else shape[0], *shape[1:]])


def loop(net: Net, x: str) -> None:
    """Put a Loop of a few steps behind a tensor, its state, and the mean of what its steps give."""
    shape = net.shapes[x]
    body = inside(net, {"s": shape})
    state = body.add("Tanh", [back(body, shape)], shape)
    kept = body.some()
    goes = body.add("Identity", [f"{body.stem}go"], ())
    given = body.add("Identity", [kept], body.shapes[kept])
    counter = helper.make_tensor_value_info(f"{body.stem}i", TensorProto.INT64, [])
    go, goes_on = (helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in (f"{body.stem}go", goes))
    graph = helper.make_graph(
        body.nodes,
        "step",
        [counter, go, declared(f"{body.stem}s", shape)],
        [goes_on, declared(state, shape), declared(given, body.shapes[given])],
    )
    trips, true = net.store(np.asarray(net.rng.choice([1, 2, 3]))), net.store(np.asarray(True))
    steps = body.shapes[given]
    net.add("Loop", [trips, true, x], shape, steps, body=graph)
    of_steps = net.nodes[-1].output[1]
    del net.shapes[of_steps]  # its first axis is no batch
    net.add("ReduceMean", [of_steps], steps, axes=[0], keepdims=0)


def scan(net: Net, x: str) -> None:
    """Put a Scan along the last axis of a tensor behind it, and along the first axis of something else."""
    shape = net.shapes[x]
    if len(shape) < 3:
        return
    element = shape[:-1]
    start = net.add("ReduceMean", [x], element, axes=[len(shape) - 1], keepdims=0)
    body = inside(net, {"s": element, "e": element})
    state = body.add("Tanh", [back(body, element)], element)
    given = body.add("Neg", [back(body, element)], element)
    graph = helper.make_graph(
        body.nodes,
        "step",
        [declared(f"{body.stem}s", element), declared(f"{body.stem}e", element)],
        [declared(state, element), declared(given, element)],
    )
    net.add(
        "Scan",
        [start, x],
        element,
        shape,
        body=graph,
        num_scan_inputs=1,
        scan_input_axes=[-1],
        scan_output_axes=[net.rng.choice([-1, len(shape) - 1])],
        scan_input_directions=[net.rng.randrange(2)],
        scan_output_directions=[net.rng.randrange(2)],
    )


def choice(net: Net, x: str) -> None:
    """Put an If behind a tensor, of which data chooses the branch."""
    shape = net.shapes[x]
    top = net.add("ReduceMax", [x], (), keepdims=0)
    condition = net.add("Greater", [top, net.store(np.float32(net.rng.choice([-9.0, 0.5, 9.0])))], ())
    for name in (top, condition):
        del net.shapes[name]
    branches = []
    for name in ("p", "q"):
        branch = inside(net, {}, [x], name)
        result = back(branch, shape)
        branches.append(helper.make_graph(branch.nodes, name, [], [declared(result, shape)]))
    net.add("If", [condition], shape, then_branch=branches[0], else_branch=branches[1])


def network(seed: int) -> ModelProto:
    """Return a random network, every third one with bodies; its outputs are what nothing reads."""
    net = Net(random.Random(seed), bodies=seed % 3 == 0)
    start = net.rng.choice([(0, 3, 8, 8), (0, 6, 5, 7), (0, 12), (0, 7)])
    net.shapes["x"] = start
    for _ in range(net.rng.randrange(4, 18)):
        layer(net, net.some())
    read = {name for node in net.nodes for name in node.input}
    ends = [name for node in net.nodes for name in node.output if name not in read][-3:]
    outputs = []
    for name in ends:  # a layer of its own, so that there is something to prune before it
        last = net.shapes[name][-1]
        outputs.append(net.add("MatMul", [name, net.weight(last, 5)], (*net.shapes[name][:-1], 5)))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *net.shapes[n][1:]]) for n in ("x", *outputs)]
    graph = helper.make_graph(net.nodes, f"random{seed}", values[:1], values[1:], net.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
