"""Device meshes, logical axes, and what each device holds."""
