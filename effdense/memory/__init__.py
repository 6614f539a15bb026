"""Memory of a training step: recorded, predicted, made to fit."""

__all__ = ["estimation", "graphs", "meta", "optimizers", "planning", "timeline"]
