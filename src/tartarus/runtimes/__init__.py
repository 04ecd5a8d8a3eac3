"""One module per isolation kind behind one `Runtime` protocol (Tartarus runtime).

The node asks a runtime for a guest and never learns how it is held; what differs between kinds is
declared in `Capabilities`.
"""
