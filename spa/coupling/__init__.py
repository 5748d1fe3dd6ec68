"""Coupled channels: the groups of a model, what they cost, and plans of which indices are kept.

Arrows: applies :mod:`spa.rules` to a :mod:`spa.model`; knows nothing of scores.
"""
