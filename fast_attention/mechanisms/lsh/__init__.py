"""Hashed attention, Reformer's."""
