"""Folders, captions, orders, prompts and caches: what goes into training, checked before it starts."""
