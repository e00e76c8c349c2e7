"""What a configuration costs, computed without torch."""
