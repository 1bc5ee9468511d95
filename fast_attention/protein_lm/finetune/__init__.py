"""Models of a property of proteins on top of a language model."""
