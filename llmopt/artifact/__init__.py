"""The format of an artifact: its manifest, its digests and how it is written atomically."""
