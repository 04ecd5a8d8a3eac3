"""Secrets: from where they are kept to where a sandbox may read them, and to nowhere else.

The node asks the broker; providers hold no value longer than it takes to hand it over.
"""
