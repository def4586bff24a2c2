"""The trainer behind ``python -m crossvit.train``; needs the extra ``train``."""
