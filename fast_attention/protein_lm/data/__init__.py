"""From files of proteins to batches of tokens."""
