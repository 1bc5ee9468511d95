"""Folders of runs: checkpoints, declarative model files, loading, exporting."""
