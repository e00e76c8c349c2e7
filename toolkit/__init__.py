"""DeepSpeed training of BERT and Transformers from one composed Hydra configuration."""

__version__ = "0.1.0"
