"""Surgery: apply a plan to a model, and build the masked original that the result is proved against.

Arrows: depends on :mod:`spa.coupling`; knows nothing of how a plan came about.
"""
