"""Ranks, engine and loop: everything right of the queue."""
