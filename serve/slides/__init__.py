"""Whole slides: slide in, maps out, block by block, resumable.

plan → worker (read, model, blend, write) → store → finish (outputs, passport); `run` does a cohort.
"""
