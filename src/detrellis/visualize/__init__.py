"""Pictures of boxes and masks, and sheets of such pictures. Needs Pillow only; masks need hotcoco."""
