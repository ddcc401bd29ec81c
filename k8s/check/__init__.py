"""Checks of the manifests: they render, they are valid by the published schemas, and they keep our rules.

`python -m k8s.check` runs all of them. Nothing here talks to a cluster.
"""
