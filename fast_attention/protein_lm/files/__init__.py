"""Files: outputs that are whole or absent, tables, JSON, npz, text."""
