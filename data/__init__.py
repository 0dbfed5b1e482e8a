"""Data sets and batches; downloads land beside these files and are ignored by git."""
