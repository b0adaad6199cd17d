"""Distillation: recipes, text, and the stages of training."""
