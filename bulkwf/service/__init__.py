"""What the Workflows API takes, says and means. Pure."""
