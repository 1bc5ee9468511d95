"""Attention functions for global arrays sharded over a mesh."""
