"""Sandboxes' networks: slots with an address and a way to the Internet, the rules around them, and names.

The node takes a slot for a sandbox that may have a network, attaches its guest before the first command, and gives it
back at the end. All of it is the host's doing: the guest has no say in its own network namespace.
"""
