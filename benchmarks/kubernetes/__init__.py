"""Kubernetes: what the platform costs beside Kubernetes alone."""
