"""Arguments that a recipe hands to what it names."""

KwargValue = bool | int | float | str
