"""Streams of networks with large weights: parts of the network are run one after the other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from spa.model.graph import Graph
from spa.running import stream as stream_module
from spa.running.feeds import make_feeds
from spa.running.runtime import load_session
from spa.running.stream import Stream


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_windows_hold_what_the_whole_network_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(f"models/{name}.onnx")
    feeds = [make_feeds(model, seed=seed) for seed in (0, 1)]
    middle = len(Graph(model).nodes) // 2

    def held() -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
        stream = Stream(model, None, feeds)
        stream.after(stream.graph.nodes[middle])
        between = [dict(batch) for batch in stream.live]
        return between, [v for batch in stream.finish() for v in batch.values()]

    whole, outputs = held()
    opened = []
    monkeypatch.setattr(stream_module, "WINDOW", 10_000)
    monkeypatch.setattr(stream_module, "load_session", lambda m, **o: opened.append(m) or load_session(m, **o))
    between, found = held()
    assert len(opened) > 4
    for a, b in zip(whole, between, strict=True):
        assert a.keys() == b.keys()
        assert all(np.allclose(a[n], b[n], atol=1e-4) for n in a)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(outputs, found, strict=True))
