"""Attention over sparse neighbourhoods."""
