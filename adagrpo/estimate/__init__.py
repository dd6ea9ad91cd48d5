"""What a recipe will cost: calls, memory, seconds."""
