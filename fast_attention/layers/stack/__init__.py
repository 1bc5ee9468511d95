"""Stacks of layers, reversible or recomputed."""
