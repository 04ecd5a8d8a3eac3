"""The API server (Olympus): who is calling, what they may see, and the daemon that serves it.

Requests arrive on a Unix socket, become typed specs or are refused whole, and go down to the node.
"""
