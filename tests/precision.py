"""64-bit types for a part of a test, whatever the version of JAX."""

import jax

# JAX 0.7.2 has the latter alone.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
