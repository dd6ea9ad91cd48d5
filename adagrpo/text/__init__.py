"""Text from and for people: reading, cutting, hiding secrets, strict JSON."""
