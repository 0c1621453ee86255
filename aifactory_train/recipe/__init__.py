"""What the user wants: YAML into strict models."""
