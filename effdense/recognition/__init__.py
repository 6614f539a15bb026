"""Which modules are dense blocks and transitions, and what keeps them from being fused."""

__all__ = ["graphs", "objections", "parts", "reading"]
