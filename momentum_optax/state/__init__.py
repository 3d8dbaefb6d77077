"""Optimizer states: read, converted, edited, measured and saved."""
