"""`predict`: a trained model, its input pictures, their detections, and the files of these."""
