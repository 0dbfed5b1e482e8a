"""Data sets, batches and tables; downloads land here by default, and git ignores them."""
