"""One file per parallel axis, and apply.py with their one order."""
