"""The models of the original packages under their names, and their weights."""
