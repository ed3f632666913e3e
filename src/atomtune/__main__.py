"""`python -m atomtune`."""

from atomtune.cli import console

if __name__ == "__main__":
    console()
