"""The state file of the training commands, which is that of ``tersor compress``."""

from tersor.command_line.state import load_state, save_state

__all__ = ["load_state", "save_state"]
