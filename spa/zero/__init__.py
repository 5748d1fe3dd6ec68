"""Lossless compaction: remove the channels that are always zero, always the same, or not read, and no others.

Pipeline: :mod:`spa.zero.facts` (forward: what is known of each tensor, by :mod:`spa.zero.transfer`) →
:mod:`spa.zero.needs` (backward: which channels matter) → :mod:`spa.zero.compaction` (the plan, and the biases that take
over constants).

Arrows: depends on :mod:`spa.coupling` and :mod:`spa.running`; its entry among :mod:`spa.criteria` is
:mod:`spa.zero.criterion`.
"""
