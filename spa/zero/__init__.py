"""Lossless compaction: remove precisely the channels that are always zero, always the same, or read by nobody.

Arrows: depends on :mod:`spa.coupling` and :mod:`spa.running`; its entry among :mod:`spa.criteria` is
:mod:`spa.zero.criterion`.
"""
