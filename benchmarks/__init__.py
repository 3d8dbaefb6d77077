"""Benchmarks: one program for each question, run as `python -m benchmarks.NAME`; modules with `_` are what they share.

Each prints a table and writes benchmarks/NAME.json. The README and the documentation quote these files, and tests
compare them.
"""
