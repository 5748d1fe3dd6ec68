"""Coupled channels: the groups of a model, the cost of any widths, and plans of the channels to keep.

Arrows: applies :mod:`spa.rules` to a :mod:`spa.model`; knows nothing of scores.
"""
