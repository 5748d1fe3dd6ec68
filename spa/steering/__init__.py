"""Steering: the user's own metric, the search for the most that may go under it, and the best of several networks.

Arrows: depends on :mod:`spa.calibration`, which reads labelled samples, and :mod:`spa.running`; it knows neither groups
nor criteria.
"""
