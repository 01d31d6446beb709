"""What measures and loads FocalPath. Not part of the wheel."""
