"""Declarations of initializers that agree with what they are after pruning and repair.

Cases:
1. An initializer that is listed in ``value_info`` (PyTorch's default exporter does so) or among the inputs has the type
   and shape of its tensor there.
2. Before IR version 4 every initializer is also an input: those that came new are listed there, too.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from spa.model.versions import FREE_INITIALIZERS


def conform(model: ModelProto) -> ModelProto:
    """Restate cases 1 and 2 in place, and return the model."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for info in (*graph.value_info, *graph.input):  # Case 1
        if info.name in tensors:
            _restate(info, tensors[info.name])
    if model.ir_version < FREE_INITIALIZERS:  # Case 2
        listed = {info.name for info in graph.input}
        graph.input.extend(
            helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            for name, tensor in tensors.items()
            if name not in listed
        )
    return model


def _restate(info: ValueInfoProto, tensor: TensorProto) -> None:
    """Give a declaration its tensor's shape; what agrees, or says nothing of the shape, stays as it is."""
    declared = info.type.tensor_type
    if not declared.HasField("shape"):
        return
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in declared.shape.dim]
    if sizes != list(tensor.dims):
        declared.CopyFrom(helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type)
