"""Published data sets and annotation formats, one file each, to a data set's folder."""
