"""Monitors' official API documents, and servers that hold every request to them."""
