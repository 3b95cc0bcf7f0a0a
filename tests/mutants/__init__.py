"""Bugs planted one at a time into a copy of the project: each must be caught, or the tests prove nothing."""
