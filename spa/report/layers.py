"""The names of layers, by which people know a network: groups are named after parameters, which exporters number."""

from __future__ import annotations

from spa.coupling.analysis import Analysis, Group


def layer_names(analysis: Analysis) -> dict[str, str]:
    """Return for each group of two channels or more the layers that compute it, by name, in the order of the network.

    >>> import spa
    >>> list(layer_names(spa.analyze("models/digits_vgg.onnx")).items())[1]
    ('features.3.weight[0]', '/features/features.3/Conv')
    """
    groups = sorted((g for g in analysis.groups if g.size > 1), key=_depth)
    return {g.name: _layers(analysis, g) for g in groups}


def _depth(group: Group) -> tuple[int, str]:
    return min(group.writers or group.operators or group.readers, default=0), group.name


def _layers(analysis: Analysis, group: Group) -> str:
    """Return the first layer that writes a group, and how many more do; its name where nothing of the graph does."""
    nodes = [analysis.graph.nodes[i] for i in group.writers or group.operators[:1]]
    names = [n.proto.name or next((o for o in n.outputs if o), n.label) for n in nodes]
    if not names:
        return group.name
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
