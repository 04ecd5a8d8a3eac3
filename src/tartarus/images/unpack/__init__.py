"""Layers on disk: unpacking, flattening, capturing and packing them, always in a jailed child.

Archives, and the trees that guests leave behind, are hostile. So no line of the daemon parses one or walks one:
`jailed` starts a child that locks itself in (`inside`) and answers with one message. The node and the image
sources call `layers`, `merge` and `capture`; import from those modules, so that the child stays quick to start.
"""
