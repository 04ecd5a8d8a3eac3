"""The nouns: ids, units, states, errors, specs and records. Frozen structs, no I/O.

Every other package imports this one and it imports none of them, so a value means the
same thing in the client, the daemon and the store.
"""
