"""Measuring a policy: held-out reward, and how faithful fast rollouts are to it."""
