"""The ``toolkit`` command."""
