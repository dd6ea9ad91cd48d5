"""A reward behind HTTP, for runs on other machines and GPUs."""
