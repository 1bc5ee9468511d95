"""Attention layers: groups of heads, their projections, their calibration."""
