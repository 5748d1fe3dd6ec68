"""Optimal brain surgery on groups, and reconstruction in closed form (OBSPA, arXiv 2403.18955, section 3.3).

*Scoring*: :mod:`~spa.obspa.score` runs the dense network, :mod:`~spa.obspa.readers` observe the inputs of each reader,
:mod:`~spa.obspa.curves` finds the order in which channels are removed. *Reconstruction*: :mod:`~spa.obspa.refit` runs
the dense and the pruned network in lockstep and refits each reader (:mod:`~spa.obspa.compensate` moves means alone).
:mod:`~spa.obspa.pipeline` is the door to both; docs/how-it-works/obspa.md has the formulas.
"""
