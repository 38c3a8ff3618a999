"""Replicas as pods: one Deployment for each replica set, and what it needs beside it. Made by `runtime.py`."""
