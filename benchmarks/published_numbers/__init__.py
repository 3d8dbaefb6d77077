"""Published numbers about momentum, reproduced: see `__main__`."""
