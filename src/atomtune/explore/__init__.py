"""Looking at an adapter: the static report."""
