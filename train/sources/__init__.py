"""Published data sets turned into SAM-Path's layout: one module a source.

layout.py  what they share: resampling, cutting tiles, folds, writing whole or not at all
bcss.py    breast cancer, region images with masks of 22 codes
crag.py    colorectal glands, images with instance masks
bdsa.py    brain tissue, region images with annotation exports of the Digital Slide Archive
dsa_annotations.py  annotation exports of the Digital Slide Archive, drawn as label maps
"""
