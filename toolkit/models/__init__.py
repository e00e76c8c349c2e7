"""Hugging Face models: from a configuration or from weights, dense or partitioned by ZeRO 3."""
