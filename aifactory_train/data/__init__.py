"""Text to tokens to rows. No torch at import."""
