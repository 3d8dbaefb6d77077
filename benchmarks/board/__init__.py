"""Bases, memories and storages on a small language model: see `__main__`."""
