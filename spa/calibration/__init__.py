"""Inputs to learn from: given, or made up."""
