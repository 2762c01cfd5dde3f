"""Choosing, splitting, merging and dropping the tokens of a vision transformer."""
