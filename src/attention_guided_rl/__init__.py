"""Attention-guided reinforcement learning: a language model learns to direct its own reading."""
