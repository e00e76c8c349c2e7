"""The whole configuration: its models and defaults, and Hydra's composition of it. No torch."""
