"""Claims about a network, and the rules by which numbers are compared."""

__all__ = ["claims", "comparison", "hidden_states", "rows"]
