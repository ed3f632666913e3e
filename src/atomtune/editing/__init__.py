"""Editing one picture: tuning on it, and a sweep of what takes part."""
