"""A small operation, written as CONTRIBUTING.md shows."""
