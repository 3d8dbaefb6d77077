"""States on many devices, and momentum between workers that synchronize rarely."""
