"""Verification at first use: a kernel is compared with the reference where nothing proves it."""
