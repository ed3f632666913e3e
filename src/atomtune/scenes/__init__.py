"""The embedded world: a small universe of emoji with exact answers, and a tiny real pipeline trained on it."""
