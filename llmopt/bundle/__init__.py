"""Edge bundles: an archive of artifacts for several machines, with digests and signatures."""
