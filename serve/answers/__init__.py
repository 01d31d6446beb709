"""What a segmentation is handed out as: pictures, polygons, documents."""
