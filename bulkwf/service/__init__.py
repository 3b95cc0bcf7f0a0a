"""The Workflows API: its requests, its answers, and what the answers mean. Pure."""
