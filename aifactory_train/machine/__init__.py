"""What the user has: facts about a machine, each with its source."""
