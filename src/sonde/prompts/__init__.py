"""Soft prompts: what a frozen model can be pushed to do, and how much information the push takes."""
