"""Fake-quantisers."""
