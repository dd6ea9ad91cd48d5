"""Everything a run folder holds: recipe, manifest, metrics, pictures, checkpoints."""
