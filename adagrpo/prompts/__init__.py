"""Prompts: sources, files, and the seeded stream that feeds training."""
