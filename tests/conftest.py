"""What is not collected: helpers that import a framework that may be missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("jax") and find_spec("equinox") and find_spec("flax") else ["jax_networks.py"]
