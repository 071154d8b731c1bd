"""wlora: experiment runner for *WeightLoRA: Keep Only Necessary Adapters* and its baselines."""

__version__ = "0.1.0"
