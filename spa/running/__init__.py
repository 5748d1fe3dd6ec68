"""onnxruntime behind one door: sessions, inputs that fit, streams through a network, comparing and timing.

Arrows: depends on :mod:`spa.model` and :mod:`spa.algebra`.
"""
