"""A mechanism in a folder of its own: every visible key has the same weight."""
