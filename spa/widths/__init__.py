"""Widths from scores and loss curves: budgets, ladders of allowed widths, rankings, allocation and measured latency.

Arrows: depends on scores (:mod:`spa.criteria`, :mod:`spa.obspa`), :mod:`spa.surgery` and :mod:`spa.running`.
"""
