"""`python -m serve doctor`: checks whether this machine can serve a bundle."""
