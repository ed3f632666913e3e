"""What becomes of runs and files when the world is unkind: a function a hazard, a row of the table each."""
