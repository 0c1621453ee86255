"""Carry a plan to the ranks. Never imports train."""
