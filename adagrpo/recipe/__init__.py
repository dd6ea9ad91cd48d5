"""Recipes: their keys, reading, checks."""
