"""The way to the service: HTTP, credentials, and when a body has left this machine."""
