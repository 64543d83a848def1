"""Data: webdataset shards (tar files of images and JSON) to batches, split over ranks and workers."""
