"""The weights that ship with the package, each beside its model card."""
