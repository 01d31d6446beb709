"""`python -m serve doctor`: whether this machine can serve a bundle, and what it lacks."""
