"""Lines of a list to batches. Pure."""
