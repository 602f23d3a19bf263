"""One training run: what it is made of, its loop, and what it leaves on the disk."""
