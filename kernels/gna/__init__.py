"""Generalized Neighborhood Attention (arXiv 2504.16922): sparse multi-dimensional attention."""
