"""What a model is and what is known of it: the graph, its normal form, every shape and small integer value.

Arrows: depends on :mod:`spa.errors` alone.
"""
