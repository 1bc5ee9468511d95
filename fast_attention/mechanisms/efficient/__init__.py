"""Efficient attention: softmax over keys and over channels."""
