"""Exact attention in blocks."""
