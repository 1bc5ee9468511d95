"""Linear attention of sequences sharded over a mesh axis."""
