"""Runnable examples: the READMEs of the originals, and two small training runs."""
