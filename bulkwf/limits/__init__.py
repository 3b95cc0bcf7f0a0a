"""What may be sent, and when."""
