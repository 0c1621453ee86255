"""aifactory-train: LLM training for the supercomputers of Europe's AI Factories.

recipe says what you want, machine says what you have, plan is where they meet,
launch carries it to the nodes, train does it, results tells what happened.
"""

__version__ = "0.1.0"
