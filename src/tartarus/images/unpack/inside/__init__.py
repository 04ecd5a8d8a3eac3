"""What runs in the jailed child.

These modules import the standard library and decompressors, and nothing else of ours but
`tartarus.images.unpack.limits`, so that the child starts in milliseconds and has little to attack.
"""
