"""Files of earlier versions, which every later version reads."""
