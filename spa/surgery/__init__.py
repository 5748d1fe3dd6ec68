"""Surgery: apply a plan to a model, and mask the original instead, which is what the result is proved against.

Arrows: depends on :mod:`spa.coupling`; knows nothing of how a plan came about.
"""
