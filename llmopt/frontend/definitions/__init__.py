"""Definitions from ``models/``, traced layer by layer and assembled."""
