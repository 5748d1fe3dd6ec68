"""Pruned models to files and frameworks; installed as ``spa.exporters``."""
