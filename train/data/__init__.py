"""From files to tiles: the data set's folder, its checks, converters and synthetic tissue."""
