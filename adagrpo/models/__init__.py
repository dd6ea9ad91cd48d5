"""Flow models: one protocol, one adapter per diffusers family."""
