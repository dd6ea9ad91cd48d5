"""How rollouts compute a velocity: the rollout copy, its forwards and precisions."""
