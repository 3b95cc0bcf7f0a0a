"""One run: batches, attempts, results."""
