"""Attention mechanisms, one folder each, and the base class that they share."""
