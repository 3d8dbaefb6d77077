"""Demonstrations and training scripts; they are run from a checkout and are not in the wheel."""
