"""wlora: experiment runner for *WeightLoRA: Keep Only Necessary Adapters* and its baselines."""

__version__ = "0.1.0"
NUMERICS_VERSION = 1
"""To be raised where the same configuration comes to give other numbers; runs of two versions are never averaged."""
