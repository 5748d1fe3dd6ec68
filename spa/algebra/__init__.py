"""The axis algebra: expressions over dimensions, their unification, and the one-line notation of operators.

Arrows: depends on :mod:`spa.model` for what a node is.
"""
