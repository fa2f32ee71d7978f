"""Object stores behind one small interface: what a remote place asks of Google Cloud Storage, S3 or any fsspec URL."""

from __future__ import annotations

from brainenc.featurestore.services.base import ObjectService, Stat, connect

__all__ = ["ObjectService", "Stat", "connect"]
