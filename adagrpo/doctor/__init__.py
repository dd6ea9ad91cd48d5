"""What this machine has and can run, and whether it is sound."""
