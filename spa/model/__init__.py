"""Models and the facts known of them: the graph, its normal form, every shape and every small integer value.

Arrows: depends on :mod:`spa.errors` alone.
"""
