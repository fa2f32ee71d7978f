"""Frozen vision backbones over image shards into the feature store."""
