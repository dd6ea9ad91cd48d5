"""Files that are whole or absent, and folders with one writer."""
