"""What an artifact is made of: its manifest, its digests and how it is written in one piece."""
