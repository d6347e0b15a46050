"""Asking language models, here or elsewhere: one interface, its limits, its bill and the answers that were paid for.

`completion` has the interface, `client` the way to use it; every back end is a module of its own that imports no other.
"""
