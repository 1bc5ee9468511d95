"""A trained model with exact attention becomes one with linear attention."""
