"""The online curriculum filter: ways to judge candidate prompts, and what they remember."""
