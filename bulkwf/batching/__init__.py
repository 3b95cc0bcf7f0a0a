"""Groups the lines of a list into batches. Pure."""
