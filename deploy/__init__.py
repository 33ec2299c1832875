"""Composition root: everything that puts the parts of Evermoe together."""
