"""Metrics and logs (Hermes): every name and every exporter in one place.

The daemon sets logging up once; the node counts; `GET /metrics` prints.
"""
