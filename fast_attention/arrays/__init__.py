"""Types of arrays, their dtypes, and the mesh axes over which they differ."""
