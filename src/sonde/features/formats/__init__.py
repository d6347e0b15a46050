"""Dictionaries of other projects, read and written: one module for each family of files, and detection."""
