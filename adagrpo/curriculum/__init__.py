"""The online curriculum filter: ways to judge candidate prompts, equal peers behind one call, and what they remember."""
