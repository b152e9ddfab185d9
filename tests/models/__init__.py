"""Transformers written by hand, as a user would bring them."""
