"""Scores, mutations, embeddings, samples of a trained model."""
