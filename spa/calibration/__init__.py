"""Calibration inputs: read from a user's data, or synthesised for a model without any."""
