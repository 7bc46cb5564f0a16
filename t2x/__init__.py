"""t2x: Transformers on device meshes, in JAX."""
