"""Concepts: find them, erase them, scrub them, steer them."""
