"""Studies: the same training in many variants."""
