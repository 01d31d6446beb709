"""Whole slides in the HTTP service: what is in a folder, tiles for viewers, and jobs.

A slide is opened by processes of its own, never by the one that answers requests: see `readers`.
"""
