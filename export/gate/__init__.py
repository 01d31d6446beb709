"""The gate: whether an artefact answers as torch does, measured on real pixels."""
