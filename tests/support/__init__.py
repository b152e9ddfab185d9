"""What several tests share: tiny models, files, artifacts and servers."""
