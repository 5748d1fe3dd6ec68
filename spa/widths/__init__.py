"""From scores and loss curves to widths: budgets, what widths are allowed, who goes first, and measured latency.

Arrows: depends on scores (:mod:`spa.criteria`, :mod:`spa.obspa`), :mod:`spa.surgery` and :mod:`spa.running`.
"""
