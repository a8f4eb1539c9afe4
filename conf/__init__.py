"""Hydra's config groups, and the code that fills them from the plugin registry."""
