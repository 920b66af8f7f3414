"""MNC: multi-task network cascades (arXiv:1512.04412)."""
