"""The benchmark harness: cells of methods, subjects and seeds, and what becomes of their rows."""
