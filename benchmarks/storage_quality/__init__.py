"""Losses and velocities with the velocity in fewer bytes: see `__main__`."""
