"""The HTTP path to a sandbox's ports: what its callers ask goes in, and what a hostile guest answers comes out tamed.

Both sides are ended here: a guest's bytes are parsed, never copied through, so that nothing in them can begin a
second answer, and what remains has no say about the API's own origin.
"""
