"""Manifests for Kubernetes, the image, and what checks them."""
