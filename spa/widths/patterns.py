"""Patterns: which groups a user means by the names of parameters, nodes, operators and modules.

A module is a prefix of a name: ``layer1.0`` of the parameter ``layer1.0.conv1.weight``, ``/layer1/layer1.0`` of the
node ``/layer1/layer1.0/conv1/Conv``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from spa.coupling.analysis import Analysis, Group, Part
from spa.errors import PlanError
from spa.model.graph import Node

Value = TypeVar("Value")


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a shell pattern is, or matches, one of some names."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in names if name)


def touching(analysis: Analysis, group: Group) -> frozenset[str]:
    """Return the names of all that a group lies on: its parameters, its readers and writers, and their modules."""
    nodes = [analysis.graph.nodes[i] for i in (*group.readers, *group.writers)]
    return frozenset(_with_modules([group.name, *(p.tensor for p in group.places)], nodes))


def inside(analysis: Analysis, branch: Part) -> frozenset[str]:
    """Return the names of a residual branch, its nodes and sum, parameters of its own, and their modules."""
    graph = analysis.graph
    nodes = [graph.nodes[i] for i in (*branch.operators, branch.end)]
    indices = {node.index for node in nodes}
    read = (name for node in nodes for name in node.inputs if name in graph.constants)
    own = [name for name in read if indices.issuperset(user.index for user, _ in graph.users[name])]
    return frozenset(_with_modules([branch.name, *own], nodes))


def writes(analysis: Analysis, group: Group, pattern: str) -> bool:
    """Return whether a pattern is a group's name, or matches what computes it.

    That are the layers whose outputs the channels are, with their modules and parameters, but for those that readers
    alone use: ``fc2.weight`` is not what ``fc1`` writes to.
    """
    if pattern == group.name:
        return True
    nodes = [analysis.graph.nodes[i] for i in group.writers]
    only_read = set(group.readers) - set(group.writers)
    inside = {
        p.tensor
        for p in group.places
        if not {user.index for user, _ in analysis.graph.users.get(p.tensor, ())} <= only_read
    }
    return matches(pattern, _with_modules(inside, nodes))


def _with_modules(tensors: Iterable[str], nodes: Sequence[Node]) -> Iterator[str]:
    for name in tensors:
        yield name
        yield from _prefixes(name, ".")
    for node in nodes:
        yield node.key
        yield node.proto.name
        yield from _prefixes(node.proto.name, "/")


def _prefixes(name: str, separator: str) -> Iterator[str]:
    """Yield the modules that a name lies in.

    >>> list(_prefixes("layer1.0.conv1.weight", "."))
    ['layer1', 'layer1.0', 'layer1.0.conv1']
    """
    for at, letter in enumerate(name):
        if letter == separator and at:
            yield name[:at]


def check_patterns(analysis: Analysis, patterns: Mapping[str, Sequence[str]]) -> None:
    """Refuse patterns that match no name in the model.

    Args:
        analysis: the model.
        patterns: by option.

    Raises:
        PlanError: there is one; the message has near names.
    """
    if not any(patterns.values()):
        return
    known = _known_names(analysis)
    for option, given in patterns.items():
        for pattern in given:
            if not matches(pattern, known):
                raise PlanError(f"{option}: nothing in the model matches {pattern!r}.{_near(pattern, known)}")


def _near(pattern: str, known: Iterable[str]) -> str:
    """Return the names that are nearest to a pattern, as the end of a message."""
    from difflib import get_close_matches

    bare = pattern.strip("*")
    near = get_close_matches(bare, known, 3, 0.5) or sorted(n for n in known if bare and bare.lower() in n.lower())[:3]
    if not near:
        return " Look for names with 'spa inspect --all'."
    return f" Did you mean {', '.join(repr(n) for n in near)}?"


def _known_names(analysis: Analysis) -> list[str]:
    """Return all names that a pattern may mean."""
    tensors = [*analysis.graph.constants, *(g.name for g in analysis.groups)]
    return list(dict.fromkeys(n for n in _with_modules(tensors, analysis.graph.nodes) if n))


def by_group(analysis: Analysis, groups: Sequence[Group], option: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return by group name the value whose pattern matches what computes the group.

    Args:
        analysis: the model.
        groups: those that may be pruned.
        option: the option's name, for messages.
        values: by pattern.

    Raises:
        PlanError: a pattern matches none of the groups, or two of them give one group different values.
    """
    found: dict[str, tuple[str, Value]] = {}
    for pattern, value in values.items():
        named = [g.name for g in groups if writes(analysis, g, pattern)]
        if not named:
            crossing = next((g for g in analysis.prunable if g.crossings and writes(analysis, g, pattern)), None)
            remedy = "'spa inspect --all' lists groups and what is frozen."
            if crossing is not None:
                remedy = f"What it names crosses {crossing.crossings[0]}: allow --cross-norm (cross_norm=True)."
            raise PlanError(
                f"{option}: {pattern!r} names no layer whose outputs may be pruned under this request. {remedy}"
            )
        for name in named:
            other, earlier = found.setdefault(name, (pattern, value))
            if earlier != value:
                raise PlanError(
                    f"{option}: {other!r} and {pattern!r} give group {name!r} {earlier} and {value}. Leave one out."
                )
    return {name: value for name, (_, value) in found.items()}
