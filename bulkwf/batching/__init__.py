"""Makes batches of the lines of a list. Pure."""
