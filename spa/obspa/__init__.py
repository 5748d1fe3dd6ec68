"""Optimal brain surgery on groups, and reconstruction in closed form (OBSPA, arXiv 2403.18955, section 3.3)."""
