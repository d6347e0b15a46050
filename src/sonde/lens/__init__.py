"""Lenses: what a language model would predict if it stopped after a layer."""
