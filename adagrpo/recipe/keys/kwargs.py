"""Arguments that a recipe hands to what it names."""

KwargLeaf = bool | int | float | str | tuple[str, ...]
KwargValue = bool | int | float | str | tuple[str, ...] | dict[str, KwargLeaf]
"""A value, a list of strings, or one level of table."""
