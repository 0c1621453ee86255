"""How well the planner predicts what others measured and published."""
