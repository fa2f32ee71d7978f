"""Sharded, memory-mapped, crash-proof store of features."""
