"""Shared by all Triton operations: configuration tables, measured configurations, launches."""
