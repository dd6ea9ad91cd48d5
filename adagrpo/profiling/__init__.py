"""Where an iteration's time, memory and energy go: ``adagrpo profile``."""
