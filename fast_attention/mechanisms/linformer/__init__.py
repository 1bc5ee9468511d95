"""Linformer: keys and values projected to a fixed length."""
