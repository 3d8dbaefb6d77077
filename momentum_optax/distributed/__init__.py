"""States on many devices, and momentum between workers that meet rarely."""
