"""Memory of a training step: recorded, predicted, made to fit."""
