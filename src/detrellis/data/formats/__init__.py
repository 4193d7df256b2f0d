"""The readers: annotation files of each format, found in a folder and read into a `RawDataset`."""
