"""Measures which backend runs a call fastest on this machine, and remembers it."""
