"""Requests to the service: HTTP, credentials, faults, and the moment when a body has left this machine."""
