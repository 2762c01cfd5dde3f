"""Choosing, splitting and dropping the tokens of a vision transformer."""
