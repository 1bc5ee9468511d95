"""Evaluation on files of proteins, baselines, diagnosis."""
