"""What a slide's result is handed out as: one file per format, and `registry.FORMATS`."""
